"""Attention under the one mask rule.

Legend of the shape suffixes in this package: B rows, T positions, S positions of the keys, D hidden size,
H query heads, K key/value heads, E width of a head, F width of the feed-forward, V vocabulary, N pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.batch import Batch, allowed, even_length
from openm6.core.errors import OpenM6Error
from openm6.core.sequence import CAUSAL
from openm6.model.changed import fold_any, pack_any
from openm6.model.config import ModelConfig
from openm6.model.norm import RMSNorm, rms_norm
from openm6.model.packed import Shrink
from openm6.model.picture_mask import PictureMask
from openm6.model.sparse import SparsePattern, block_mask

QUERY_CHUNK = 128
"""Queries a chunk of the plain attention; each chunk looks only at the keys that some query of it may see."""

PLAIN_LIMIT = 2048
"""Longest row for the plain attention, which keeps the probabilities of a layer for its backward pass."""


@dataclass(slots=True)
class DenseMask:
    """The mask rule as 0 / -inf in the attention's dtype, [B, 1, T, T], and for each chunk of QUERY_CHUNK
    queries the range of keys that any of them may see."""

    bias: Tensor
    bounds: list[tuple[int, int]]


def build_mask(segments_BT: Tensor, blocks_BT: Tensor, dtype: torch.dtype, flex: bool | None = None) -> Any:
    """The mask of a batch, in the form of the attention that will use it, made once a forward.

    On a GPU (or with `flex`): FlexAttention's BlockMask, which skips the blocks in which nothing is allowed.
    On a CPU: a DenseMask.
    """
    if flex if flex is not None else segments_BT.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            together = (blocks_BT[b, q] == blocks_BT[b, k]) & (blocks_BT[b, q] >= 0)
            return (segments_BT[b, q] == segments_BT[b, k]) & ((k <= q) | together)

        rows, length = segments_BT.shape
        return create_block_mask(rule, rows, None, length, length, device=segments_BT.device)
    mask_BTS = allowed(segments_BT, blocks_BT)
    seen_TS = mask_BTS.any(0)
    bounds = []
    for chunk in seen_TS.split(QUERY_CHUNK):
        keys = chunk.any(0).nonzero()
        bounds.append((int(keys[0]), int(keys[-1]) + 1))
    return DenseMask(additive(mask_BTS[:, None], dtype), bounds)


@dataclass(slots=True)
class RowMask:
    """An additive mask [B, 1, 1 or T, S] of queries that look into a cache on several threads of a CPU. Products of
    every row take the place of SDPA, whose sums there depend on which thread takes a head."""

    bias: Tensor

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        rows, kv_heads, keys, width = k_BKSE.shape
        q = (q_BHTE * width**-0.5).reshape(rows * kv_heads, -1, width)  # queries of one key head beside each other
        scores = torch.bmm(q, k_BKSE.flatten(0, 1).transpose(1, 2)).view(*q_BHTE.shape[:3], keys) + self.bias
        p = scores.softmax(-1).view(rows * kv_heads, -1, keys)
        return torch.bmm(p, v_BKSE.flatten(0, 1)).view(q_BHTE.shape)


def row_mask(allowed_mask: Tensor, dtype: torch.dtype, reproducible: bool) -> Any:
    """The mask of a decoding step, True/False in, for SDPA; `reproducible`: for sums that do not depend on the other
    rows, which takes another way where a CPU has several threads."""
    bias = additive(allowed_mask, dtype)
    several = reproducible and not bias.is_cuda and torch.get_num_threads() > 1
    return RowMask(bias) if several else bias


@dataclass(slots=True)
class PromptMask:
    """The mask rule of padded prompts on a CPU, a part for all rows of about one length: their numbers, the positions
    they have, and the mask of those. Each part is attended to by itself, so that a prompt's sums are added up in the
    same order whatever longer ones are beside it."""

    parts: list[tuple[list[int], int, DenseMask]]

    def attend(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        if len(self.parts) == 1 and self.parts[0][1] == q_BHTE.shape[2]:
            return attend(q_BHTE, k_BKTE, v_BKTE, self.parts[0][2])
        y_BHTE = torch.zeros_like(q_BHTE)
        for rows, length, mask in self.parts:
            q, k, v = (x[rows, :, :length] for x in (q_BHTE, k_BKTE, v_BKTE))
            y_BHTE[rows, :, :length] = attend(q, k, v, mask)
        return y_BHTE


def build_prompt_mask(segments_BT: Tensor, blocks_BT: Tensor, counts: list[int], dtype: torch.dtype) -> PromptMask:
    """`counts`: the positions of each row."""
    by_length: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        by_length.setdefault(min(even_length(count), segments_BT.shape[1]), []).append(row)
    parts = []
    for length, rows in by_length.items():
        bias = additive(allowed(segments_BT[rows, :length], blocks_BT[rows, :length])[:, None], dtype)
        parts.append((rows, length, DenseMask(bias, [(0, length)] * -(-length // QUERY_CHUNK))))
    return PromptMask(parts)


def build_picture_mask(config: ModelConfig, batch: Batch, dtype: torch.dtype) -> PictureMask:
    """The mask of a batch whose rows hold the codes of a drawn picture in the same columns (`pad_drawn`), all by masks
    or all one after the other."""
    assert batch.codes is not None
    device, columns = batch.ids.device, torch.arange(batch.ids.shape[1], device=batch.ids.device)
    inside = (columns >= batch.codes.start) & (columns < batch.codes.stop)
    segments, blocks = batch.segments, batch.blocks
    others = columns[~inside]
    together = (blocks[:, others, None] == blocks[:, None]) & (blocks[:, others, None] >= 0)
    seen = (segments[:, others, None] == segments[:, None]) & ((columns <= others[:, None]) | together)
    one_by_one = bool(blocks[0, batch.codes.start] == CAUSAL)
    pattern = SparsePattern.of(config, one_by_one)
    if pattern.codes != len(batch.codes):
        raise OpenM6Error(f"A picture of {len(batch.codes)} codes; model.picture_side makes them {pattern.codes}.")
    # The text, and what follows the codes where they see each other both ways.
    before = batch.codes.start
    told = (segments[:, others] > 0) & ((others < before) | (not one_by_one))
    mask = block_mask(pattern, len(others), told, device) if device.type == "cuda" else None
    return PictureMask(pattern, before, before, additive(seen[:, None], dtype), told, mask)


def additive(allowed_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True/False to 0/-inf."""
    return torch.zeros_like(allowed_mask, dtype=dtype).masked_fill_(~allowed_mask, float("-inf"))


_flex_compiled: Any = None


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Any) -> Tensor:
    """softmax(q k / sqrt(E) + mask) v, [B, H, T, E].

    `mask` chooses the means: PictureMask, PromptMask and RowMask their own, BlockMask FlexAttention, DenseMask plain
    products up to PLAIN_LIMIT positions (on a CPU and short rows several times faster than SDPA, whose backward pass is
    slow there; see benchmarks/attention.py), anything else SDPA.
    """
    if isinstance(mask, (PictureMask, PromptMask, RowMask)):
        return mask.attend(q_BHTE, k_BKSE, v_BKSE)
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    if isinstance(mask, DenseMask):
        if q_BHTE.shape[2] <= PLAIN_LIMIT:
            repeat = q_BHTE.shape[1] // k_BKSE.shape[1]
            if grouped:
                k_BKSE, v_BKSE = k_BKSE.repeat_interleave(repeat, 1), v_BKSE.repeat_interleave(repeat, 1)
            return _PlainAttention.apply(q_BHTE, k_BKSE, v_BKSE, mask)
        mask = mask.bias
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, enable_gqa=grouped)
    from torch.nn.attention.flex_attention import flex_attention

    global _flex_compiled
    if q_BHTE.is_cuda and _flex_compiled is None:
        _flex_compiled = torch.compile(flex_attention)
    run = _flex_compiled if q_BHTE.is_cuda else flex_attention
    return run(q_BHTE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped)


class _PlainAttention(torch.autograd.Function):
    """Attention by matrix products, chunk by chunk of the queries, skipping keys that no query may see."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask: DenseMask) -> Tensor:
        rows, heads, length, width = q_BHTE.shape
        q = (q_BHTE * width**-0.5).reshape(-1, length, width)
        k, v = k_BHTE.reshape(-1, length, width), v_BHTE.reshape(-1, length, width)
        out, probabilities = torch.empty_like(v), []
        for index, (low, high) in enumerate(mask.bounds):
            part = slice(index * QUERY_CHUNK, (index + 1) * QUERY_CHUNK)
            scores = torch.bmm(q[:, part], k[:, low:high].transpose(1, 2))
            scores = scores.view(rows, heads, -1, high - low).add_(mask.bias[:, :, part, low:high])
            p = torch.softmax(scores, dim=-1).view(rows * heads, -1, high - low)
            out[:, part] = torch.bmm(p, v[:, low:high])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.bounds = mask.bounds
        return out.view(rows, heads, length, width)

    @staticmethod
    def backward(ctx: Any, d_out_BHTE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *probabilities = ctx.saved_tensors
        shape, width = d_out_BHTE.shape, q.shape[-1]
        d_out = d_out_BHTE.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for index, ((low, high), p) in enumerate(zip(ctx.bounds, probabilities, strict=True)):
            part = slice(index * QUERY_CHUNK, (index + 1) * QUERY_CHUNK)
            dv[:, low:high] += torch.bmm(p.transpose(1, 2), d_out[:, part])
            dp = torch.bmm(d_out[:, part], v[:, low:high].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, part] = torch.bmm(ds, k[:, low:high])
            dk[:, low:high] += torch.bmm(ds.transpose(1, 2), q[:, part])
        return dq.mul_(width**-0.5).view(shape), dk.view(shape), dv.view(shape), None


def rotary_angles(config: ModelConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """cos and signed sin of the rotary positions (RoFormer, section 3.4.2), each [B, T, 1, E]; None where the
    positions are not rotary.

    The pairs are (i, i + E/2); the sine of a pair's first half is negative, so that turning is two products
    and a roll (see `rotate`). Taken in fp32, then brought to the precision in which they are used.
    """
    if config.positions != "rotary":
        return None
    width, theta = config.head_dim, config.rope_theta
    frequency = theta ** (-torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float32) / width)
    angle = (positions_BT[..., None].float() * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x_BTHE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + E/2) of each head by the angle of their position."""
    cos, sin = rope
    return torch.addcmul(x_BTHE * cos, x_BTHE.roll(x_BTHE.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Grouped-query self-attention with one fused projection to queries, keys and values.

    `qk_norm` puts an RMSNorm on every query and key head (as Qwen3 does; Chameleon needed it to train stably
    on text and image codes together).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.width, bias=config.bias)
        self.out = nn.Linear(self.heads * self.width, config.hidden_size, bias=config.bias)
        self.out.writes_to_stream = True  # type: ignore[assignment]  # for the initialization
        self.q_norm = RMSNorm(self.width, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.width, eps=config.norm_eps) if config.qk_norm else None
        self.packed_norm: nn.Module | None = None
        self.packed_scale: Tensor | None = None

    def _norm_scale(self) -> Tensor:
        """The weights of both norms, [H + K, E]."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        return torch.cat((self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)))

    def pack(self, norm: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Lay the weights out for decoding on a CPU; returns what takes the place of the norm before."""
        norm, self.qkv = fold_any(norm, self.qkv, dtype)  # type: ignore[assignment]
        self.out = pack_any(self.out, dtype)  # type: ignore[assignment]
        if self.q_norm is not None:
            self.packed_norm = Shrink(self.width, self.q_norm.eps)
            self.packed_scale = self._norm_scale().detach() * self.width**0.5
        return norm

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Any, cache: Any = None, layer: int = 0
    ) -> Tensor:
        rows, length, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(rows, length, -1, self.width)
        # Queries and keys go through norm and rotation together: half the passes over memory.
        qk, v_BTKE = qkv[:, :, : -self.kv_heads], qkv[:, :, -self.kv_heads :]
        if self.packed_norm is not None:
            qk = self.packed_norm(qk) * self.packed_scale
        elif self.q_norm is not None:
            qk = rms_norm(qk, self._norm_scale(), self.q_norm.eps)
        if rope is not None:
            qk = rotate(qk, rope)
        # Norms may widen to fp32; the products run in the precision of the values: the projection's or the cache's.
        qk_BHTE = (qk.to(qkv.dtype) if cache is None else qk).transpose(1, 2)
        q_BHTE, k_BKSE, v_BKSE = qk_BHTE[:, : self.heads], qk_BHTE[:, self.heads :], v_BTKE.transpose(1, 2)
        if cache is not None:
            k_BKSE, v_BKSE = cache.update(layer, k_BKSE, v_BKSE)
        y_BHTE = attend(q_BHTE.to(v_BKSE.dtype), k_BKSE.to(v_BKSE.dtype), v_BKSE, mask).to(qkv.dtype)
        return self.out(y_BHTE.transpose(1, 2).reshape(rows, length, -1))

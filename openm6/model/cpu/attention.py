"""Attention on a CPU by plain products, and masks under which a row's sums do not depend on the rows beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.core.batch import allowed, padded_length
from openm6.model import cpu
from openm6.model.attention import attend

QUERY_CHUNK = 128
"""Queries a chunk of the plain attention; each chunk looks only at the keys that some query of it may see."""

PLAIN_LIMIT = 2048
"""Longest row for the plain attention, which keeps the probabilities of a layer for its backward pass."""


def additive(allowed_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True/False to 0/-inf."""
    return torch.zeros_like(allowed_mask, dtype=dtype).masked_fill_(~allowed_mask, float("-inf"))


@dataclass(slots=True)
class DenseMask:
    """The mask rule as 0 / -inf in the attention's dtype, [B, 1, T, T], and for each chunk of QUERY_CHUNK
    queries the range of keys that any of them may see."""

    bias: Tensor
    bounds: list[tuple[int, int]]

    def attend(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """Plain products up to PLAIN_LIMIT positions: on short rows several times faster than SDPA, whose backward pass
        is slow on a CPU (benchmarks/attention.py)."""
        if q_BHTE.shape[2] > PLAIN_LIMIT:
            return attend(q_BHTE, k_BKSE, v_BKSE, self.bias)
        if (repeat := q_BHTE.shape[1] // k_BKSE.shape[1]) > 1:
            k_BKSE, v_BKSE = k_BKSE.repeat_interleave(repeat, 1), v_BKSE.repeat_interleave(repeat, 1)
        return _PlainAttention.apply(q_BHTE, k_BKSE, v_BKSE, self)  # type: ignore[no-any-return]


def dense_mask(seen_BTS: Tensor, dtype: torch.dtype) -> DenseMask:
    """The mask of True where a query sees a key, in the attention's `dtype`."""
    seen_TS = seen_BTS.any(0)
    bounds = []
    for chunk in seen_TS.split(QUERY_CHUNK):
        keys = chunk.any(0).nonzero()
        bounds.append((int(keys[0]), int(keys[-1]) + 1))
    return DenseMask(additive(seen_BTS[:, None], dtype), bounds)


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
    several = reproducible and cpu.takes(bias) and torch.get_num_threads() > 1
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
        by_length.setdefault(min(padded_length(count), segments_BT.shape[1]), []).append(row)
    parts = []
    for length, rows in by_length.items():
        bias = additive(allowed(segments_BT[rows, :length], blocks_BT[rows, :length])[:, None], dtype)
        parts.append((rows, length, DenseMask(bias, [(0, length)] * -(-length // QUERY_CHUNK))))
    return PromptMask(parts)


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

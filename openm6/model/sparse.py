"""Block-sparse attention for long pictures: rows, columns and neighbourhoods of tiles.

The codes of a picture of side 64 are 4,096; full attention among them is most of what a layer costs. Here the codes are
grouped into tiles, and a tile sees its tile row and its tile column (Sparse Transformers, Child et al. 2019, arXiv
1904.10509, in two dimensions) and the 3 x 3 tiles around it: 21% of all pairs of tiles at side 64. Text is always seen.

`SparsePattern.allowed` is the one definition. Three implementations follow from it: gathered blocks (`sparse_attend`,
for CPUs), FlexAttention (`flex_attend`, for GPUs), and lists of positions for decoding code by code.

Shapes, beside the legend in attention.py: N codes of a picture, row by row; L positions of text; J tiles of A codes,
row by row, and A codes row by row inside; I tiles of keys, those of the text before the J; G = B x K; Q = A x (H / K)
queries that share a tile of keys; C kept tiles of keys, S = C x A; X tiles of some heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openm6.core.errors import UsageError

if TYPE_CHECKING:
    from openm6.model.config import ModelConfig

PRODUCTS = 8
"""Tiles (of all heads) a thread multiplies at a time: what they touch stays in its cache (8 took 141 ms, 32 took 172
ms, for forward and backward of 4 heads at side 64 on one core)."""


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """The attention pattern among the `side` x `side` codes of an image, in tiles of `tile` (rows, columns) codes.

    With `causal`, a code sees no later one, row by row. A tile of 4 x 8 codes has 32 rows, enough for efficient
    products on a CPU and blocks of FlexAttention. Raises UsageError where the tiles do not fill the picture.
    """

    side: int
    tile: tuple[int, int] = (4, 8)
    causal: bool = False

    def __post_init__(self) -> None:
        if any(length < 1 or self.side % length for length in self.tile):
            raise UsageError(
                f"Tiles of {self.tile[0]} x {self.tile[1]} codes do not fill a picture of {self.side} x {self.side}; "
                "give a side that is a multiple of both."
            )

    @classmethod
    def of(cls, config: ModelConfig, causal: bool = False) -> SparsePattern:
        """The pattern of a model with `picture_side`."""
        assert config.picture_side is not None
        return cls(config.picture_side, tuple(config.picture_tile), causal)  # type: ignore[arg-type]

    def allowed(self, query: Any, key: Any) -> Any:
        """True where code number `query` sees code number `key`, row by row: integers, or tensors that broadcast."""
        height, width = self.tile
        down = abs(query // self.side // height - key // self.side // height)
        right = abs(query % self.side // width - key % self.side // width)
        seen = (down == 0) | (right == 0) | ((down <= 1) & (right <= 1))
        return seen & (key <= query) if self.causal else seen

    @property
    def codes(self) -> int:
        return self.side**2

    @property
    def area(self) -> int:
        """Codes a tile."""
        return self.tile[0] * self.tile[1]

    @property
    def tiles(self) -> int:
        return self.codes // self.area

    @property
    def kept_share(self) -> float:
        """Pairs of tiles that are looked at, of all pairs."""
        return float(self.neighbours()[1].sum()) / self.tiles**2

    def code_at(self, place: Any) -> Any:
        """The code number (row by row) at a place in tile order."""
        (height, width), across = self.tile, self.side // self.tile[1]
        tile, inside = place // self.area, place % self.area
        row, column = tile // across * height + inside // width, tile % across * width + inside % width
        return row * self.side + column

    def tile_order(self) -> Tensor:
        """int64 [N], the code at each place in tile order: `x[..., order, :]` brings rows into tile order."""
        return self.code_at(torch.arange(self.codes))

    def to_tiles(self, x: Tensor) -> Tensor:
        """[..., N, E] row by row to [..., J, A, E]: `tile_order` without an index, so that the way back is one too."""
        (height, width), lead = self.tile, x.shape[:-2]
        grid = x.reshape(*lead, self.side // height, height, self.side // width, width, -1)
        return grid.transpose(-4, -3).reshape(*lead, self.tiles, self.area, -1)

    def to_rows(self, x: Tensor) -> Tensor:
        """[..., J, A, E] to [..., N, E] row by row."""
        (height, width), lead = self.tile, x.shape[:-3]
        grid = x.reshape(*lead, self.side // height, self.side // width, height, width, -1)
        return grid.transpose(-4, -3).reshape(*lead, self.codes, -1)

    def neighbours(self) -> tuple[Tensor, Tensor]:
        """The tiles that each tile sees, int64 [J, C] in rising order, and whether an entry is one, bool [J, C] (counts
        differ at the edges; the rest is 0)."""
        codes_JA = self.tile_order().view(self.tiles, self.area)
        # The last code of a tile sees all that any of it sees, and the first one is seen by all that see any.
        seen_JJ = self.allowed(codes_JA[:, -1:], codes_JA[:, 0])
        counts_J = seen_JJ.sum(1)
        real_JC = torch.arange(int(counts_J.max())) < counts_J[:, None]
        table_JC = torch.zeros(real_JC.shape, dtype=torch.long)
        table_JC[real_JC] = seen_JJ.nonzero()[:, 1]
        return table_JC, real_JC


def sparse_attend(
    q_BHNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, k_text_BKLE: Tensor, v_text_BKLE: Tensor, pattern: SparsePattern,
    text_mask_BL: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k / sqrt(E)) v of a picture's codes over its text and, under the pattern, each other; [B, H, N, E].

    All row by row, in one precision. `text_mask` is True where text may be seen; L may be 0. Runs on any device, and is
    made for a CPU, where FlexAttention has no backward pass and is slower forward. SDPA on the same gathered blocks
    took a quarter longer than these products, and kept the gathered blocks of every layer.
    """
    rows, heads, _, width = q_BHNE.shape
    kv_heads = k_BKNE.shape[1]
    with torch.autocast(q_BHNE.device.type, enabled=False):
        kv_2GIAE, text_mask_BL = _keys_by_tile(k_BKNE, v_BKNE, k_text_BKLE, v_text_BKLE, pattern, text_mask_BL)
        hidden_GL = None if text_mask_BL is None else ~text_mask_BL.repeat_interleave(kv_heads, 0)
        q_BHJAE = pattern.to_tiles(q_BHNE * width**-0.5)
        shared = q_BHJAE.reshape(rows * kv_heads, heads // kv_heads, pattern.tiles, pattern.area, width)
        y_GJQE = _GatheredBlocks.apply(shared.transpose(1, 2).flatten(2, 3), kv_2GIAE, hidden_GL, pattern)
    shared = y_GJQE.view(rows * kv_heads, pattern.tiles, -1, pattern.area, width).transpose(1, 2)
    return pattern.to_rows(shared.reshape(q_BHJAE.shape))


def _keys_by_tile(
    k_BKNE: Tensor, v_BKNE: Tensor, k_text_BKLE: Tensor, v_text_BKLE: Tensor, pattern: SparsePattern,
    text_mask_BL: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Keys and values of the text, filled up to whole tiles, and of the codes, by tile: [2, G, I, A, E]; and the text's
    mask filled up likewise, [B, L], or None where all of it is seen."""
    rows, heads, length, width = k_text_BKLE.shape
    missing = -length % pattern.area
    if missing and text_mask_BL is None:
        text_mask_BL = torch.ones(rows, length, dtype=torch.bool, device=k_BKNE.device)
    if text_mask_BL is not None:
        text_mask_BL = F.pad(text_mask_BL, (0, missing))
    both = []
    for text, codes in ((k_text_BKLE, k_BKNE), (v_text_BKLE, v_BKNE)):
        shape = (rows * heads, (length + missing) // pattern.area, pattern.area, width)
        text_GIAE = F.pad(text, (0, 0, 0, missing)).reshape(shape)
        both.append(torch.cat((text_GIAE, pattern.to_tiles(codes).flatten(0, 1)), 1))
    return torch.stack(both), text_mask_BL


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some tiles that see equally many: their `kept` tiles of keys, int64 [tiles x C], text first; and the keys from
    `start` on that single queries must not see, bool [tiles, A, S - start], or None."""

    tiles: slice
    kept: Tensor
    start: int
    hidden: Tensor | None


@lru_cache(maxsize=32)
def _chunks(pattern: SparsePattern, text_tiles: int, limit: int, device: torch.device) -> list[_Chunk]:
    """All tiles in order, at most `limit` a chunk."""
    table_JC, real_JC = pattern.neighbours()
    counts = real_JC.sum(1).tolist()
    codes_JA = pattern.tile_order().view(pattern.tiles, pattern.area)
    chunks = []
    for count, group in groupby(range(pattern.tiles), key=counts.__getitem__):
        for tiles in torch.tensor(list(group)).split(limit):
            kept = table_JC[tiles, :count]
            seen = pattern.allowed(codes_JA[tiles][:, :, None], codes_JA[kept].flatten(1)[:, None])
            columns = (~seen).flatten(0, 1).any(0).nonzero()
            start = int(columns[0]) if len(columns) else seen.shape[-1]
            text = torch.arange(text_tiles).expand(len(tiles), -1)
            chunks.append(
                _Chunk(
                    slice(int(tiles[0]), int(tiles[-1]) + 1),
                    torch.cat((text, kept + text_tiles), 1).flatten().to(device),
                    start + text_tiles * pattern.area,
                    ~seen[..., start:].to(device) if len(columns) else None,
                )
            )
    return chunks


class _Parts:
    """Blocks of work, some heads and some tiles each, in memory that all blocks reuse (with an allocation for each,
    forward and backward took 6% longer)."""

    def __init__(self, q_GJQE: Tensor, kv_2GIAE: Tensor, hidden_GL: Tensor | None, pattern: SparsePattern):
        self.q, self.kv, self.hidden, self.pattern = q_GJQE, kv_2GIAE, hidden_GL, pattern
        self.memory: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, _Chunk]]:
        products, heads = PRODUCTS * torch.get_num_threads(), len(self.q)
        text_tiles = self.kv.shape[2] - self.pattern.tiles
        chunks = _chunks(self.pattern, text_tiles, max(1, products // heads), self.q.device)
        return ((slice(first, first + products), chunk) for first in range(0, heads, products) for chunk in chunks)

    def room(self, name: str, *shape: int) -> Tensor:
        """Memory of this name, [*shape]; its contents are undefined."""
        size = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = self.q.new_empty(size)
        return self.memory[name][:size].view(shape)

    def look(self, heads: slice, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [X, Q, E], probabilities [X, Q, S], keys and values [X, S, E] of a part."""
        q, kv = self.q[heads, chunk.tiles], self.kv[:, heads]
        number, tiles, queries, width = q.shape
        gathered = self.room("gathered", 2, number, len(chunk.kept), *kv.shape[3:])
        torch.index_select(kv, 2, chunk.kept, out=gathered)
        k_XSE, v_XSE = gathered.view(2, number * tiles, -1, width)
        q_XQE = q.reshape(number * tiles, queries, width)
        scores = self.room("scores", number, tiles, queries, k_XSE.shape[1])
        p_XQS = scores.view(number * tiles, queries, -1)
        torch.bmm(_by_columns(q_XQE), k_XSE.mT, out=p_XQS)
        if self.hidden is not None:
            scores[..., : self.hidden.shape[1]].masked_fill_(self.hidden[heads, None, None], float("-inf"))
        if chunk.hidden is not None:
            later = scores.view(number, tiles, -1, self.pattern.area, scores.shape[-1])[..., chunk.start :]
            later.masked_fill_(chunk.hidden[:, None], float("-inf"))
        return q_XQE, torch.softmax(p_XQS, -1, out=p_XQS), k_XSE, v_XSE


def _by_columns(x_XQE: Tensor) -> Tensor:
    """The same numbers with a column's side by side: so MKL multiplies 32 x 32 by 32 x 928 at 70 GFLOP/s instead of 24
    (one core with AVX-512)."""
    return x_XQE.mT.contiguous().mT


class _GatheredBlocks(torch.autograd.Function):
    """Tiles of queries over gathered tiles of keys, part by part; the backward pass gathers and multiplies again."""

    @staticmethod
    def forward(ctx: Any, q_GJQE: Tensor, kv_2GIAE: Tensor, hidden_GL: Tensor | None, pattern: SparsePattern) -> Tensor:
        out, parts = torch.empty_like(q_GJQE), _Parts(q_GJQE, kv_2GIAE, hidden_GL, pattern)
        for heads, chunk in parts:
            _, p, _, v = parts.look(heads, chunk)
            _put(out[heads, chunk.tiles], torch.bmm(p, v))
        ctx.save_for_backward(q_GJQE, kv_2GIAE, hidden_GL)
        ctx.pattern = pattern
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_GJQE: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_GJQE, kv_2GIAE, hidden_GL = ctx.saved_tensors
        # The gradient of a sum is one number, expanded, which bmm would multiply item by item.
        d_out_GJQE, parts = d_out_GJQE.contiguous(), _Parts(q_GJQE, kv_2GIAE, hidden_GL, ctx.pattern)
        dq, dkv = torch.empty_like(q_GJQE), torch.zeros_like(kv_2GIAE)
        with torch.autocast(q_GJQE.device.type, enabled=False):  # which would narrow what is written into given memory
            for heads, chunk in parts:
                q, p, k, v = parts.look(heads, chunk)
                d_out = d_out_GJQE[heads, chunk.tiles].reshape(q.shape)
                ds, d_gathered = parts.room("ds", *p.shape), parts.room("d_gathered", 2, *k.shape)
                torch.bmm(p.mT, d_out, out=d_gathered[1])
                torch.bmm(_by_columns(d_out), v.mT, out=ds)
                torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
                torch.bmm(ds.mT, q, out=d_gathered[0])
                _put(dq[heads, chunk.tiles], torch.bmm(ds, k))
                part = dkv[:, heads]
                some = d_gathered.view(*part.shape[:2], -1, *part.shape[3:])
                for one in np.ndindex(*part.shape[:2]):  # along a first axis index_add_ is up to 2.6 times as fast
                    part[one].index_add_(0, chunk.kept, some[one])
        return dq, dkv, None, None


def _put(part: Tensor, values: Tensor) -> None:
    part.copy_(values.view(part.shape))


def block_mask(
    pattern: SparsePattern, length: int, text_mask_BL: Tensor | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The pattern as FlexAttention's BlockMask, a block a tile: queries are the codes in tile order, keys `length`
    positions of text filled up to whole tiles, then the codes in tile order.

    Without a `text_mask` it holds for any number of rows; it is worth keeping: making it looks at every pair once.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    before = length + -length % pattern.area
    if text_mask_BL is not None:  # of whole tiles too: what is compiled for it serves every length up to there
        text_mask_BL = F.pad(text_mask_BL, (0, before - length))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Both sides are taken for every pair: a place that the other side asks for must exist.
        text = k < length if text_mask_BL is None else text_mask_BL[b, k.clamp(max=before - 1)]
        seen = pattern.allowed(pattern.code_at(q), pattern.code_at((k - before).clamp(min=0)))
        return torch.where(k < before, text, seen)

    rows = None if text_mask_BL is None else len(text_mask_BL)
    return create_block_mask(
        rule, rows, None, pattern.codes, before + pattern.codes, device=str(device), BLOCK_SIZE=pattern.area
    )


@cache
def _compiled_flex(cuda: bool) -> Any:
    """FlexAttention. On a GPU, tuned and for each shape by itself: only then its backward pass has kernels as small as
    a tile of 32 codes (for shapes in general the tuned kernels of tiles of 64 took a third longer on an H200)."""
    from torch.nn.attention.flex_attention import flex_attention

    if not cuda:
        return torch.compile(flex_attention)
    # A shape for each number of rows and of the text's tiles. Beyond the limit nothing is compiled, nor skipped.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)


def flex_attend(
    q_BHNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor, k_text_BKLE: Tensor, v_text_BKLE: Tensor, pattern: SparsePattern,
    mask: Any, compiled: bool = True,
) -> Tensor:  # fmt: skip
    """The same as `sparse_attend` by FlexAttention, with `mask` from `block_mask`; [B, H, N, E].

    On a CPU it goes forward only. What is not compiled skips nothing.
    """
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex(q_BHNE.is_cuda) if compiled else flex_attention
    kv_2GIAE, _ = _keys_by_tile(k_BKNE, v_BKNE, k_text_BKLE, v_text_BKLE, pattern, None)
    k_BKSE, v_BKSE = kv_2GIAE.view(2, *k_BKNE.shape[:2], -1, k_BKNE.shape[-1])
    grouped = q_BHNE.shape[1] != k_BKNE.shape[1]
    q_BHJAE = pattern.to_tiles(q_BHNE)
    # A kernel's blocks may not be larger than the mask's; the usual ones are of up to 128.
    small = q_BHNE.is_cuda and pattern.area < 128
    options = {"fwd_BLOCK_M": pattern.area, "fwd_BLOCK_N": pattern.area} if small else None
    y_BHNE = run(q_BHJAE.flatten(2, 3), k_BKSE, v_BKSE, block_mask=mask, enable_gqa=grouped, kernel_options=options)
    return pattern.to_rows(y_BHNE.view(q_BHJAE.shape))


@lru_cache(maxsize=4)
def seen_codes(pattern: SparsePattern) -> tuple[Tensor, ...]:
    """For every code, row by row, the codes up to itself that it sees when they are decoded one after the other, int64
    [count], in rising order."""
    numbers = torch.arange(pattern.codes)
    return tuple(pattern.allowed(code, numbers[: code + 1]).nonzero()[:, 0] for code in range(pattern.codes))

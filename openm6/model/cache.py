"""Decoding: the key/value cache, and the passes of the network that fill and read it.

prefill   padded prompts, one in each row
step      one further position of every row
fill      several further positions of every row, which see each other both ways and are not kept
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from openm6.core.batch import Batch, cells_of
from openm6.core.errors import OpenM6Error
from openm6.model import cpu
from openm6.model.config import ModelConfig
from openm6.model.cpu.attention import additive, build_prompt_mask, row_mask
from openm6.model.m6 import M6
from openm6.model.masks import PictureMask, build_mask
from openm6.model.rotary import rotary_angles
from openm6.model.sparse import SparsePattern, block_mask, seen_codes

F = TypeVar("F", bound=Callable[..., Any])

EVEN_KEYS = 16
"""On a CPU a decoding step sees a multiple of so many keys (the last ones masked): the kernel then adds up a row in the
same order whatever rows are beside it."""


class KVCache:
    """Keys and values of B sequences up to `capacity` positions, for all layers.

    `capacity` is rounded up to a multiple of EVEN_KEYS.
    Row b holds `lengths[b]` positions, from 0 on; `counts` is the same on the host, so that a step need not ask the
    device. `select` reorders rows (beam search) or drops finished ones. `rope` holds the rotary angles of all
    positions, [1, capacity, 1, E] each. On a CPU keys and values are kept in fp32: one query against many keys is
    there five times faster than in bf16.
    """

    def __init__(self, config: ModelConfig, lengths: Tensor, capacity: int, dtype: torch.dtype):
        device = lengths.device
        dtype = torch.float32 if device.type == "cpu" else dtype
        capacity = -(-capacity // EVEN_KEYS) * EVEN_KEYS
        self.rope = rotary_angles(config, torch.arange(capacity, device=device)[None], dtype)
        shape = (len(lengths), config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths, self.counts = lengths, lengths.tolist()

    def select(self, rows: Tensor) -> None:
        self.keys = [k.index_select(0, rows) for k in self.keys]
        self.values = [v.index_select(0, rows) for v in self.values]
        self.lengths = self.lengths.index_select(0, rows)
        self.counts = self.lengths.tolist()

    def part(self, rows: slice) -> KVCache:
        """Some of the rows; they share memory with this cache."""
        part = copy(self)
        part.keys, part.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        part.lengths, part.counts = self.lengths[rows], self.counts[rows]
        return part

    def rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rotary angles of positions [B, N], [B, N, 1, E] each."""
        return self.rope and (self.rope[0][0, positions], self.rope[1][0, positions])

    def grow(self) -> None:
        """Count one more position in every row."""
        self.lengths = self.lengths + 1
        self.counts = [count + 1 for count in self.counts]


@dataclass(slots=True)
class View:
    """The cache during one pass: `put(stored, new)` keeps the new keys or values of a layer,
    [B, K, T, E], and returns the ones that the new positions attend to, [B, K, S, E]."""

    cache: KVCache
    put: Callable[[Tensor, Tensor], Tensor]

    def update(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        return self.put(self.cache.keys[layer], k_BKTE), self.put(self.cache.values[layer], v_BKTE)


def _through_network(run: F) -> F:
    """A pass called through a method of the network, during which FSDP gathers the weights of a sharded network."""

    @wraps(run)
    def call(model: M6, *args: Any, **options: Any) -> Any:
        return model.decode(run, *args, **options)

    return cast(F, call)


def prefill(model: M6, batch: Batch, capacity: int) -> tuple[Tensor, KVCache]:
    """Run padded prompts (one a row, from column 0) and keep their keys and values.

    Returns the hidden state at the last position of every row, [B, D], and the cache.
    """
    x_BTD, cache = prefill_all(model, batch, capacity)
    return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), cache.lengths - 1], cache


@_through_network
def prefill_all(model: M6, batch: Batch, capacity: int) -> tuple[Tensor, KVCache]:
    """`prefill` with the hidden states at all positions, [B, T, D]."""
    x_BTD = model.embed_batch(batch)
    dtype = model.product_dtype(x_BTD)
    cache = KVCache(model.config, (batch.segments > 0).sum(1), capacity, dtype)
    length = min(x_BTD.shape[1], capacity)  # beyond it is padding

    def put(stored: Tensor, new_BKTE: Tensor) -> Tensor:
        stored[:, :, :length] = new_BKTE[:, :, :length]
        return new_BKTE

    if cpu.takes(batch.ids):
        mask: Any = build_prompt_mask(batch.segments, batch.blocks, cache.counts, dtype)
    else:
        mask = build_mask(batch.segments, batch.blocks, dtype)
    rope = rotary_angles(model.config, batch.positions, dtype)
    return model.backbone(x_BTD, rope, mask, View(cache, put), batch)[0], cache


@_through_network
def step(
    model: M6, ids_B: Tensor, cache: KVCache, code: int | None = None, codes: int = 0, reproducible: bool = False
) -> Tensor:
    """One further (causal) position for every row of the cache; hidden states [B, D]. `reproducible`: see row_mask.

    `code`: the position is this one of an image's `codes`, row by row, and the codes before it are the last ones in the
    cache; in a model with `picture_side` it attends only to the codes of the pattern.
    """
    cell = None if code is None else cells_of(codes)[code].to(ids_B.device)
    if code is not None and model.config.picture_side:
        return _sparse_step(model, ids_B, cache, code, cell)
    positions_B1 = cache.lengths[:, None]
    x_B1D = model.embed_ids(ids_B[:, None], positions_B1, cell)
    filled = max(cache.counts) + 1
    same_length, on_cpu = min(cache.counts) + 1 == filled, ids_B.device.type == "cpu"
    # On a CPU a row's sums over its keys would else depend on the longest row beside it, in the last bit.
    keys_seen = min(-(-filled // EVEN_KEYS) * EVEN_KEYS, cache.keys[0].shape[2]) if on_cpu else filled
    rope, mask = cache.rope, None
    if same_length:
        rope = rope and (rope[0][:, filled - 1 : filled], rope[1][:, filled - 1 : filled])
    else:
        rows = torch.arange(len(ids_B), device=ids_B.device)
        rope = cache.rope_at(positions_B1)
    if on_cpu or not same_length:
        seen = torch.arange(keys_seen, device=ids_B.device) <= positions_B1
        mask = row_mask(seen[:, None, None], cache.keys[0].dtype, reproducible)

    def put(stored: Tensor, new_BK1E: Tensor) -> Tensor:
        if same_length:
            stored[:, :, filled - 1 : filled] = new_BK1E
        else:
            stored[rows, :, cache.lengths] = new_BK1E[:, :, 0].to(stored.dtype)
        return stored[:, :, :keys_seen]

    x_B1D, _ = model.backbone(x_B1D, rope, mask, View(cache, put))
    cache.grow()
    return x_B1D[:, 0]


def _sparse_step(model: M6, ids_B: Tensor, cache: KVCache, code: int, cell: Tensor | None) -> Tensor:
    pattern = SparsePattern.of(model.config, causal=True)
    positions_B1, rows = cache.lengths[:, None], torch.arange(len(ids_B), device=ids_B.device)
    x_B1D, rope = model.embed_ids(ids_B[:, None], positions_B1, cell), cache.rope_at(positions_B1)
    texts_B = cache.lengths - code
    longest = max(cache.counts) - code
    codes_S = seen_codes(pattern)[code].to(ids_B.device)
    text_L = torch.arange(longest, device=ids_B.device)
    keys_BS = torch.cat((text_L.expand(len(ids_B), -1), texts_B[:, None] + codes_S), 1)
    same_length, mask = min(cache.counts) == max(cache.counts), None
    if not same_length:
        seen = torch.cat((text_L < texts_B[:, None], keys_BS.new_ones(len(ids_B), len(codes_S)).bool()), 1)
        mask = additive(seen[:, None, None], cache.keys[0].dtype)

    def put(stored: Tensor, new_BK1E: Tensor) -> Tensor:
        stored[rows, :, cache.lengths] = new_BK1E[:, :, 0].to(stored.dtype)
        if same_length:
            return stored.index_select(2, keys_BS[0])
        return stored.transpose(1, 2)[rows[:, None], keys_BS].transpose(1, 2)

    x_B1D, _ = model.backbone(x_B1D, rope, mask, View(cache, put))
    cache.grow()
    return x_B1D[:, 0]


@_through_network
def fill(model: M6, ids_BN: Tensor, cache: KVCache, codes: int, lengths_B: Tensor | None = None) -> Tensor:
    """N further positions of every row, which see the cache and, both ways, each other; hidden states [B, N, D].
    The first `codes` of them are those of a picture, row by row; only the first `lengths_B` of a row are seen.

    The cache is not changed: masked positions can be filled repeatedly.
    """
    rows, count = ids_BN.shape
    positions_BN = cache.lengths[:, None] + torch.arange(count, device=ids_BN.device)
    cells_N2 = pad(cells_of(codes).to(ids_BN.device), (0, 0, 0, count - codes), value=-1)
    x_BND, rope = model.embed_ids(ids_BN, positions_BN, cells_N2), cache.rope_at(positions_BN)
    longest, on_cpu = max(cache.counts), ids_BN.device.type == "cpu"
    mask: Any = None
    if model.config.picture_side:
        mask = _filling_mask(model.config, count, cache)
    elif min(cache.counts) < longest or lengths_B is not None or on_cpu:
        longest = -(-longest // EVEN_KEYS) * EVEN_KEYS if on_cpu else longest  # as in a step
        seen = torch.arange(longest, device=ids_BN.device) < cache.lengths[:, None]
        last = count if lengths_B is None else lengths_B[:, None]
        own = (torch.arange(count, device=ids_BN.device) < last).expand(rows, count)
        seen = torch.cat((seen, own), 1)
        mask = row_mask(seen[:, None, None], cache.keys[0].dtype, reproducible=True)

    def put(stored: Tensor, new_BKNE: Tensor) -> Tensor:
        return torch.cat((stored[:, :, :longest], new_BKNE.to(stored.dtype)), 2)

    return model.backbone(x_BND, rope, mask, View(cache, put))[0]


def _filling_mask(config: ModelConfig, count: int, cache: KVCache) -> PictureMask:
    """The mask of a picture's codes and of what follows them, after the texts of a cache."""
    pattern, longest, device = SparsePattern.of(config), max(cache.counts), cache.lengths.device
    tail = count - pattern.codes
    if tail < 0:
        raise OpenM6Error(f"{count} codes; model.picture_side makes a picture of {pattern.codes}.")
    text_BL = torch.arange(longest, device=device) < cache.lengths[:, None]
    seen = pad(text_BL, (0, tail), value=True)
    after = pad(text_BL, (0, count), value=True)[:, None, None].expand(-1, 1, tail, -1)
    mask = block_mask(pattern, longest + tail, seen, device) if device.type == "cuda" else None
    return PictureMask(pattern, longest, 0, additive(after, cache.keys[0].dtype), seen, mask)

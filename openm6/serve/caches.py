"""Caches of the engine: keys and values of the texts in progress, a slot for each, and of recently read prompts; and
features of recent pictures."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from openm6.core.sequence import Sequence
from openm6.inference.decoding import kv_bytes
from openm6.model import M6
from openm6.model.cache import KVCache, step
from openm6.model.rotary import rotary_angles

T = TypeVar("T")

SHORTEST = 64
"""Minimum number of positions of a slot."""


@dataclass(slots=True)
class Prefix:
    """A prompt after prefill: keys and values of every layer, [K, T, E] each, and the hidden state of its last
    position, [D]."""

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor

    @property
    def positions(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in (*self.keys, *self.values, self.hidden))


class Slots:
    """Slots within `budget` bytes. Every slot has the positions that the longest text needs, rounded up to a power of
    two and at most `limit`. The first `len` slots are in use: when one is dropped, the last moves into its place."""

    def __init__(self, model: M6, limit: int, budget: int, dtype: torch.dtype):
        config, device = model.config, model.embed.weight.device
        self.limit, self.capacity = limit, 0
        self._budget, self._config = budget, config
        self._position_bytes = kv_bytes(model, 1, 1, dtype)
        self._cache = KVCache(config, torch.zeros(0, dtype=torch.int64, device=device), 0, dtype)
        self._used = self._cache  # the slots in use, of the same memory
        self._size = 0  # number of slots in memory

    def __len__(self) -> int:
        return len(self._used.counts)

    def room(self, positions: int) -> int:
        """Number of further texts that fit if one of them has so many positions; an empty cache has room for one text
        of any length."""
        return self._max_slots(self._rounded(max(positions, self.capacity if len(self) else 0))) - len(self)

    def _rounded(self, positions: int) -> int:
        return min(self.limit, max(SHORTEST, 1 << (positions - 1).bit_length()))

    def _max_slots(self, capacity: int) -> int:
        return max(1, self._budget // (capacity * self._position_bytes))

    @torch.inference_mode()
    def add(self, prefixes: list[Prefix], positions: int) -> None:
        """Give each prompt a slot; `positions` is the final length of the longest of their texts."""
        first, count = len(self), len(prefixes)
        self._grow(first + count, positions)
        for slot, prefix in enumerate(prefixes, first):
            for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                self._cache.keys[layer][slot, :, : prefix.positions] = keys
                self._cache.values[layer][slot, :, : prefix.positions] = values
        self._use([*self._used.counts, *(prefix.positions for prefix in prefixes)])

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """Free a slot; the last slot in use takes its number."""
        counts, last = self._used.counts, len(self) - 1
        if slot != last:
            used = counts[last]
            for stored in (*self._cache.keys, *self._cache.values):
                stored[slot, :, :used] = stored[last, :, :used]
            counts[slot] = counts[last]
        self._use(counts[:last])

    def step(self, model: M6, tokens_B: Tensor, only: int | None = None, reproducible: bool = False) -> Tensor:
        """One further position of every slot in use, or of slot `only`; hidden states [B, D]. A failure leaves the
        slots as they were. `reproducible`: see cache.step."""
        if only is None:
            return step(model, tokens_B, self._used, reproducible=reproducible)
        one = self._used.part(slice(only, only + 1))
        hidden = step(model, tokens_B, one, reproducible=reproducible)
        self._used.lengths[only], self._used.counts[only] = one.lengths[0], one.counts[0]
        return hidden

    def _use(self, counts: list[int]) -> None:
        self._used = used = copy(self._cache)
        used.keys, used.values = ([layer[: len(counts)] for layer in stored] for stored in (used.keys, used.values))
        used.lengths = torch.tensor(counts, dtype=torch.int64, device=self._cache.lengths.device)
        used.counts = counts

    def _grow(self, wanted: int, positions: int) -> None:
        """Allocate memory for `wanted` slots, at least doubling it; shrink it once long texts have left."""
        used, capacity = len(self), self._rounded(positions)
        if used or 4 * capacity > self.capacity:
            capacity = max(capacity, self.capacity)
        if wanted <= self._size and capacity == self.capacity:
            return
        size = self._size if wanted <= self._size else max(wanted, 2 * self._size, 4)
        size, kept = min(self._max_slots(capacity), size), min(capacity, self.capacity)

        def larger(old: Tensor) -> Tensor:
            new = torch.zeros((size, old.shape[1], capacity, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:used, :, :kept] = old[:used, :, :kept]
            return new

        # All layers are allocated before any is replaced: where memory runs out, the slots stay as they are.
        keys, values = ([larger(layer) for layer in stored] for stored in (self._cache.keys, self._cache.values))
        self._cache.keys, self._cache.values = keys, values
        if capacity != self.capacity:
            places = torch.arange(capacity, device=self._cache.lengths.device)[None]
            self._cache.rope = rotary_angles(self._config, places, self._cache.keys[0].dtype)
        self._size, self.capacity = size, capacity


def prefixes_of(hidden_BD: Tensor, cache: KVCache) -> list[Prefix]:
    """The prompts of a prefilled cache: copies, so that each can be freed alone; for a single prompt the cache
    itself."""
    found = []
    for row, count in enumerate(cache.counts):
        keys, values = ([layer[row, :, :count] for layer in stored] for stored in (cache.keys, cache.values))
        if len(cache.counts) > 1:
            keys, values = [layer.clone() for layer in keys], [layer.clone() for layer in values]
        found.append(Prefix(keys, values, hidden_BD[row].clone()))
    return found


def key_of(prompt: Sequence) -> bytes:
    """A digest of everything that the network reads of a prompt.

    A source that attends to itself in both directions has a cache whose beginning depends on its end: only whole
    prompts are reused, never prefixes of them.
    """
    shown = [
        (repr((one.start, one.patches, one.pixels.shape)).encode(), one.pixels.tobytes()) for one in prompt.pictures
    ]
    return _digest(prompt.ids.tobytes(), prompt.blocks.tobytes(), *chain.from_iterable(shown))


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


class Recent(Generic[T]):
    """Values by key; the least recently used are evicted first."""

    def __init__(self, budget: int):
        self._budget, self._used = budget, 0
        self._known: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: bytes) -> T | None:
        found = self._known.get(key)
        if found is None:
            self.misses += 1
            return None
        self._known.move_to_end(key)
        self.hits += 1
        return found[0]

    def put(self, key: bytes, value: T, size: int) -> None:
        if key in self._known or size > self._budget:
            return
        self._known[key] = value, size
        self._used += size
        while self._used > self._budget:
            _, (_, oldest) = self._known.popitem(last=False)
            self._used -= oldest

    def __len__(self) -> int:
        return len(self._known)


class Features:
    """Replaces `forward` of a network's image embedder, for inference: uint8 [N, H, W, 3] to [N * h * w, D], cached by
    the pixels of each picture. The parameters keep their names."""

    def __init__(self, embedder: nn.Module, budget: int):
        self.read: Callable[[Tensor], Tensor] = embedder.forward
        self.recent: Recent[Tensor] = Recent(budget)
        embedder.forward = self  # type: ignore[assignment]

    @classmethod
    def of(cls, embedder: nn.Module, budget: int) -> Features:
        """The cache of an embedder, created once."""
        return embedder.forward if isinstance(embedder.forward, Features) else cls(embedder, budget)

    def __call__(self, pixels: Tensor) -> Tensor:
        keys = [_digest(repr(tuple(one.shape)).encode(), one.cpu().contiguous().numpy().tobytes()) for one in pixels]
        found = {key: self.recent.get(key) for key in keys}
        new = [number for number, key in enumerate(keys) if found[key] is None]
        new = list({keys[number]: number for number in new}.values())  # each picture once
        if new:
            read = self.read(pixels[new]).unflatten(0, (len(new), -1))
            for number, features in zip(new, read, strict=True):
                found[keys[number]] = features
                self.recent.put(keys[number], features.clone(), features.nbytes)
        return torch.cat([features for key in keys if (features := found[key]) is not None])

"""Keys and values of the texts that are being written, a slot each."""

from __future__ import annotations

import hashlib
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.core.sequence import Sequence
from openm6.model import M6, ModelConfig
from openm6.model.attention import rotary_angles
from openm6.model.cache import KVCache, step

SHORTEST = 64
"""Positions of a slot at least."""


@dataclass(slots=True)
class Prefix:
    """A prompt that was read: keys and values of every layer, [K, T, E] each, and the hidden state at its last
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
    """Texts within `budget` bytes. All slots have as many positions as the longest text there needs, a power of two of
    them, `limit` at most. The first `len` slots are in use, always: the last one moves into the place of one that is
    given back."""

    def __init__(self, model: M6, limit: int, budget: int, dtype: torch.dtype):
        config, device = model.config, model.embed.weight.device
        self.limit, self.capacity = limit, 0
        self._budget, self._config, self._dtype = budget, config, dtype
        self._cache = KVCache(config, torch.zeros(0, dtype=torch.int64, device=device), 0, dtype)
        self._used = self._cache  # the slots in use, of the same memory
        self._size = 0  # slots there is memory for now

    def __len__(self) -> int:
        return len(self._used.counts)

    def room(self, positions: int) -> int:
        """Further texts that fit when one of so many positions is among them; where there is none, one always fits."""
        return self._most(self._even(max(positions, self.capacity if len(self) else 0))) - len(self)

    def _even(self, positions: int) -> int:
        return min(self.limit, max(SHORTEST, 1 << (positions - 1).bit_length()))

    def _most(self, capacity: int) -> int:
        device = self._cache.lengths.device
        return max(1, self._budget // bytes_of_slot(self._config, capacity, self._dtype, device))

    @torch.inference_mode()
    def add(self, prefixes: list[Prefix], positions: int) -> None:
        """Give each prompt the next slot; the longest of them will have so many positions in the end."""
        first, count = len(self), len(prefixes)
        self._grow(first + count, positions)
        for slot, prefix in enumerate(prefixes, first):
            for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                self._cache.keys[layer][slot, :, : prefix.positions] = keys
                self._cache.values[layer][slot, :, : prefix.positions] = values
        self._use([*self._used.counts, *(prefix.positions for prefix in prefixes)])

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """Give a slot back; the last one in use has its number from now on."""
        counts, last = self._used.counts, len(self) - 1
        if slot != last:
            used = counts[last]
            for stored in (*self._cache.keys, *self._cache.values):
                stored[slot, :, :used] = stored[last, :, :used]
            counts[slot] = counts[last]
        self._use(counts[:last])

    def step(self, model: M6, tokens_B: Tensor, only: int | None = None, reproducible: bool = False) -> Tensor:
        """One further position of every slot in use, or of one of them alone; hidden states [B, D]. Where it fails, the
        slots are as they were. `reproducible`: see cache.step."""
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
        """Memory is taken as it is needed, doubling, and kept; given back where a long text has left nobody behind."""
        used, capacity = len(self), self._even(positions)
        if used or 4 * capacity > self.capacity:
            capacity = max(capacity, self.capacity)
        if wanted <= self._size and capacity == self.capacity:
            return
        size = self._size if wanted <= self._size else max(wanted, 2 * self._size, 4)
        size, kept = min(self._most(capacity), size), min(capacity, self.capacity)

        def larger(old: Tensor) -> Tensor:
            new = torch.zeros((size, old.shape[1], capacity, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:used, :, :kept] = old[:used, :, :kept]
            return new

        # All of it before any is taken: where memory runs out, the slots stay as they are.
        keys, values = ([larger(layer) for layer in stored] for stored in (self._cache.keys, self._cache.values))
        self._cache.keys, self._cache.values = keys, values
        if capacity != self.capacity:
            places = torch.arange(capacity, device=self._cache.lengths.device)[None]
            self._cache.rope = rotary_angles(self._config, places, self._cache.keys[0].dtype)
        self._size, self.capacity = size, capacity


def bytes_of_slot(config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> int:
    wide = 4 if device.type == "cpu" else dtype.itemsize  # as KVCache keeps them
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * capacity * wide


def prefixes_of(hidden_BD: Tensor, cache: KVCache) -> list[Prefix]:
    """A prefilled cache, prompt by prompt: copies, so that one can be forgotten without the others; of a single prompt
    the cache itself."""
    found = []
    for row, count in enumerate(cache.counts):
        keys, values = ([layer[row, :, :count] for layer in stored] for stored in (cache.keys, cache.values))
        if len(cache.counts) > 1:
            keys, values = [layer.clone() for layer in keys], [layer.clone() for layer in values]
        found.append(Prefix(keys, values, hidden_BD[row].clone()))
    return found


def key_of(prompt: Sequence) -> bytes:
    """Of all that the network sees of a prompt.

    A source sees itself both ways: what the cache holds of its beginning depends on its end. So a whole prompt is found
    again, not a part of it.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(prompt.ids.tobytes())
    digest.update(prompt.blocks.tobytes())
    for picture in prompt.pictures:
        digest.update(repr((picture.start, picture.patches, picture.pixels.shape)).encode())
        digest.update(picture.pixels.tobytes())
    return digest.digest()

"""Pictures of goods: combinations of each split, and records whose pictures are stored apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np

from openm6.data.store import Record, StoredRecords
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, Item

PICTURES = {"train": 24_000, "validation": 1_000, "test": 1_000}


SPLITS = tuple(PICTURES)


def _held_out() -> frozenset[Item]:
    """51 of the 256 combinations: at most one of the four patterns of each (category, colour), at most two of the eight
    of each (category, pattern) and (colour, pattern). So every pair remains in training."""
    rng = np.random.default_rng(6)
    rows, columns = rng.permutation(len(CATEGORIES)), rng.permutation(len(COLOURS))
    square = [
        Item(category, colour, PATTERNS[(rows[i] + columns[j]) % len(PATTERNS)])
        for i, category in enumerate(CATEGORIES)
        for j, colour in enumerate(COLOURS)
    ]
    return frozenset(square[i] for i in rng.permutation(len(square))[:51])


HELD_OUT = _held_out()


_ALL = [Item(k, c, p) for k in CATEGORIES for c in COLOURS for p in PATTERNS]


@cache
def combinations(split: str) -> tuple[Item, ...]:
    return tuple(item for item in _ALL if (item in HELD_OUT) == (split == "test"))


class Pictured:
    """Records that refer to pictures by number; the pictures are read from their own store.

    `places`: columns with a picture's number, and the names of the columns for the pictures themselves."""

    def __init__(self, pictures: StoredRecords, rows: StoredRecords, places: Mapping[str, str]):
        self._pictures, self._rows, self._places = pictures, rows, places
        self.columns = tuple(places.get(name, name) for name in rows.columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        record = self._rows[index]
        return {self._places.get(k, k): self._pictures.blob(v) if k in self._places else v for k, v in record.items()}

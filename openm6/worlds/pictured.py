"""Pictures of goods: combinations of each split, records drawn in threads, and records with pictures stored apart."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import numpy as np

from openm6.data.store import ComputedRecords, Record, StoredRecords, cached, check_split, shown, write_records
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, Item

PICTURES = {"train": 24_000, "validation": 1_000, "test": 1_000}
SPLITS = tuple(PICTURES)

T = TypeVar("T")


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


def in_threads(draw: Callable[[int], T], count: int, what: str) -> Iterator[T]:
    """`draw(0)` to `draw(count - 1)`, in order, computed in several threads, with a progress bar called `what`."""
    with ThreadPoolExecutor() as pool:
        yield from shown(pool.map(draw, range(count)), count, what)


Draw = Callable[[int, str, int], Record]
"""A function of seed, split and index."""


def drawn(
    name: str, version: int, draw: Draw, split: str, seed: int, sizes: Mapping[str, int], pictures: int | None
) -> StoredRecords:
    """The records `draw(seed, split, index)` of a split, generated at the first call, then from the cache. `sizes`: the
    default number of pictures of each split. `version` has to be increased when the same seed gives other records, so
    that old caches are not used. Raises UsageError for an unknown split."""
    check_split(f"The data of {name} have", split, tuple(sizes))
    count = sizes[split] if pictures is None else pictures
    key = {"version": version, "split": split, "seed": seed, "pictures": count}
    records = in_threads(partial(draw, seed, split), count, f"drawing the {split} pictures of {name}")
    return StoredRecords(cached(name, key, lambda folder: write_records(folder, records)))


def with_pictures(pictures: StoredRecords, rows: StoredRecords, places: Mapping[str, str]) -> ComputedRecords:
    """Rows that refer to pictures by number, with the pictures. `places`: columns with a picture's number, and the
    names of the columns for the pictures themselves."""

    def row(index: int) -> Record:
        return {places.get(k, k): pictures.blob(v) if k in places else v for k, v in rows[index].items()}

    return ComputedRecords(len(rows), (places.get(name, name) for name in rows.columns), row)

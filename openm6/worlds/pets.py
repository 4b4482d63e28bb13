"""Pets: a few pictures of one animal, to adapt a model to a subject that it has never seen.

A pet is determined by its seed: a name, a kind of animal, the colour and the pattern of its coat. Its pictures show it
at different places and sizes, on different backgrounds, like the goods of a shop. Records: image (JPEG), caption
(four), name."""

from __future__ import annotations

import numpy as np

from openm6.data.store import ListRecords, Record, Records, check_split
from openm6.worlds.draw import COLOURS, PATTERNS, STUDIO, Item, Placed, draw_picture
from openm6.worlds.outlines import PETS

PICTURES = {"train": 20, "test": 100}
SPLITS = tuple(PICTURES)

_FIRST, _SECOND = "小大阿老", "花米豆乐宝球果团"
_CAPTIONS = ("{n}。", "图中是{n}。", "{n}的照片。", "这是{n}。")
_COATS = [(colour, pattern) for colour in COLOURS for pattern in PATTERNS]
_ORDER = np.random.default_rng(11).permutation(len(_COATS))


def pet(seed: int) -> tuple[str, Item]:
    """Name and appearance of a pet."""
    first, second = seed % len(_FIRST), seed // len(_FIRST) % len(_SECOND)
    animal = tuple(PETS)[(first + second) % len(PETS)]
    return _FIRST[first] + _SECOND[second], Item(animal, *_COATS[_ORDER[seed % len(_COATS)]])


def picture(seed: int, split: str, index: int) -> Record:
    """One record, determined by its arguments."""
    name, animal = pet(seed)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 13])
    size = rng.uniform(0.55, 0.85)
    x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
    return {
        "_where": f"pets/{split}?seed={seed}#{index}",
        "image": draw_picture([Placed(animal, x, y, size)], rng, STUDIO),
        "caption": [text.format(n=name) for text in _CAPTIONS],
        "name": name,
    }


def open_pets(split: str = "train", seed: int = 0, pictures: int | None = None) -> Records:
    """The pictures of the pet `seed`. Raises UsageError for an unknown split."""
    check_split("The pets have", split, SPLITS)
    count = PICTURES[split] if pictures is None else pictures
    return ListRecords([picture(seed, split, index) for index in range(count)])

"""Pictures edited by a sentence: one attribute of the goods changes, all else stays.

Records: before, request (把颜色换成蓝色。), after (JPEG, 64 x 64, in the studio's manner), kind (the changed
attribute), and the category, colour and pattern of `after`. Splits and held-out combinations are the catalogue's:
requests of the test split are for combinations that no training picture shows, before or after."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from openm6.data.store import Record, Records, check_split, drawn
from openm6.worlds import draw
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, STUDIO, Item, Placed
from openm6.worlds.pictured import HELD_OUT, SPLITS

VERSION = 1
"""Version of the generated records; increase it when the same seed gives other records, so that old caches are not
used."""

PICTURES = {"train": 8_000, "validation": 500, "test": 500}

VALUES: dict[str, tuple[str, ...]] = {"category": CATEGORIES, "colour": tuple(COLOURS), "pattern": PATTERNS}
_REQUESTS = {
    "category": ("换成{v}。", "把它改成{v}。", "改为{v}，其他不变。"),
    "colour": ("把颜色换成{v}色。", "改成{v}色的。", "颜色改为{v}色，其他不变。"),
    "pattern": ("把图案换成{v}。", "改成{v}的。", "图案改为{v}，其他不变。"),
}


def record(seed: int, split: str, index: int) -> Record:
    """One record, determined by its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 9])
    kind = tuple(VALUES)[rng.integers(len(VALUES))]
    while True:
        before = Item(*(choices[rng.integers(len(choices))] for choices in VALUES.values()))
        value = VALUES[kind][rng.integers(len(VALUES[kind]))]
        after = replace(before, **{kind: value})
        if after != before and before not in HELD_OUT and (after in HELD_OUT) == (split == "test"):
            break
    size = rng.uniform(0.6, 0.9)
    x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
    plain = draw.ground([COLOURS[item.colour] for item in (before, after)], rng)
    seeds = rng.integers(2**32, size=2)
    # The same outline, tilt, light and camera for both, and the same tones unless the colour is changed.
    placed = [Placed(item, x, y, size) for item in (before, after)]
    first, second = (draw.look_of(one, np.random.default_rng(seeds[0]), STUDIO) for one in placed)
    if kind != "colour":
        second = replace(second, base=first.base, tone=first.tone, edge=first.edge)
    pictures = []
    for one, look in zip(placed, (first, second), strict=True):
        canvas = plain.copy()
        draw.add(canvas, one, look, np.random.default_rng(seeds[1]))
        pictures.append(draw.photo(canvas, np.random.default_rng(seeds[1]), STUDIO))
    words = _REQUESTS[kind]
    return {
        "_where": f"edits/{split}#{index}", "before": pictures[0], "after": pictures[1],
        "request": words[rng.integers(len(words))].format(v=value), "kind": kind, "category": after.category,
        "colour": after.colour + "色", "pattern": after.pattern,
    }  # fmt: skip


def open_edits(split: str = "train", seed: int = 0, pictures: int | None = None) -> Records:
    """The records of a split, generated at the first call, then from the cache."""
    check_split("The edits have", split, SPLITS)
    count = PICTURES[split] if pictures is None else pictures
    key = {"version": VERSION, "split": split, "seed": seed, "pictures": count}
    return drawn("edits", key, count, partial(record, seed, split), f"drawing the {split} edits")

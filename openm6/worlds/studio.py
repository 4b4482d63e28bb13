"""Studio pictures of the demo's goods, to learn drawing from: one item, large and upright, hardly any noise, patterns
bold enough for the 8 x 8 codes of a small image codec.

Each record has image, caption (six), category, colour, pattern, and conditions for drawing: sketch (an edge drawing of
the picture), reference (another picture of the same category, colour and pattern) and style (one of another category in
the same colour and pattern). Splits and held-out combinations are the catalogue's.

`Matches` are the same pictures, half of them with wrong captions, to learn relevance from."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from openm6.core.images import sketch
from openm6.data.store import Record, Records, StoredRecords, cached, shown, write_records
from openm6.worlds import phrases
from openm6.worlds.draw import SIDE, STUDIO, Item, Placed, draw_picture
from openm6.worlds.pictured import SPLITS, Pictured, combinations

VERSION = 1
"""Version of the generated records; increase it when the same seed gives other records, so that old caches are not
used."""

PICTURES = {"train": 16_000, "validation": 1_000, "test": 1_000}


def picture(seed: int, split: str, index: int) -> tuple[Item, Record]:
    """An item and its picture's record, determined by the arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    every = combinations(split)
    item = every[rng.integers(len(every))]
    size = rng.uniform(0.6, 0.9)
    x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
    image = draw_picture([Placed(item, x, y, size)], rng, STUDIO)
    lines = io.BytesIO()
    sketch(image, SIDE).convert("1").save(lines, "PNG")
    return item, {
        "_where": f"demo:studio/{split}#{index}", "image": image, "caption": phrases.captions((item,), "", rng),
        "category": item.category, "colour": item.colour + "色", "pattern": item.pattern, "sketch": lines.getvalue(),
    }  # fmt: skip


def open_studio(split: str, seed: int = 0, pictures: int | None = None) -> Records:
    """The records of a split, generated at the first call, then from the cache."""
    count = PICTURES[split] if pictures is None else pictures

    def make(folder: Path) -> None:
        items: list[Item] = []

        def drawn() -> Iterator[Record]:
            with ThreadPoolExecutor() as pool:
                made = pool.map(partial(picture, seed, split), range(count))
                for item, record in shown(made, count, f"drawing the {split} pictures of the studio"):
                    items.append(item)
                    yield {"image": record.pop("image")}
                    rows.append(record)

        rows: list[Record] = []
        write_records(folder / "pictures", drawn())
        write_records(folder / "records", _pointing(items, rows, seed))

    folder = cached("studio", {"version": VERSION, "split": split, "seed": seed, "pictures": count}, make)
    places = {"picture": "image", "reference_picture": "reference", "style_picture": "style"}
    return Pictured(StoredRecords(folder / "pictures"), StoredRecords(folder / "records"), places)


class Matches:
    """Studio pictures with a right caption, or one that is wrong in a single attribute: image, caption (six),
    verdict_relevance (1 or 0, half of each) and match (是 or 否, the same). Wrong captions name combinations of the
    split alone, as right ones do."""

    columns = ("image", "caption", "verdict_relevance", "match")

    def __init__(self, studio: Records, split: str, seed: int = 0):
        self._studio, self._split, self._seed = studio, split, seed

    def __len__(self) -> int:
        return len(self._studio)

    def __getitem__(self, index: int) -> Record:
        record = self._studio[index]
        told = {name: record[name] for name in self.columns[:2]}
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), index, 2])
        right = bool(rng.random() < 0.5)
        if not right:
            item = Item(record["category"], record["colour"].removesuffix("色"), record["pattern"])
            groups = _near(item, self._split)
            others = groups[rng.integers(len(groups))]
            told["caption"] = phrases.captions((others[rng.integers(len(others))],), "", rng)
        return {
            "_where": f"demo:matches/{self._split}#{index}",
            **told,
            "verdict_relevance": int(right),
            "match": "是" if right else "否",
        }


@cache
def _near(item: Item, split: str) -> tuple[tuple[Item, ...], ...]:
    """For each attribute the items of a split that differ in it alone, where there are any; else all others (a few
    held-out items have none)."""
    every = (
        tuple(o for o in combinations(split) if replace(o, **{name: getattr(item, name)}) == item and o != item)
        for name in ("category", "colour", "pattern")
    )
    return tuple(some for some in every if some) or (tuple(o for o in combinations(split) if o != item),)


def _pointing(items: list[Item], rows: list[Record], seed: int) -> Iterator[Record]:
    """The records with the numbers of their own picture, of a similar one and of one in its style (where there are
    none, in small sets, its own)."""
    rng = np.random.default_rng([seed, len(items)])
    alike: dict[Item, list[int]] = defaultdict(list)
    styled: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        alike[item].append(number)
        styled[item.colour, item.pattern].append(number)
    for number, (item, row) in enumerate(zip(items, rows, strict=True)):
        same = [other for other in alike[item] if other != number] or [number]
        others = [n for n in styled[item.colour, item.pattern] if items[n].category != item.category] or [number]
        yield {
            **row, "picture": number, "reference_picture": same[rng.integers(len(same))],
            "style_picture": others[rng.integers(len(others))],
        }  # fmt: skip

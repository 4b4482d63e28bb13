"""Studio pictures of the demo's goods, to learn drawing from: one item, large and upright, hardly any noise, patterns
bold enough for the 8 x 8 codes of a small image codec.

Each record has image, caption (six), category, colour, pattern, and conditions for drawing: sketch (an edge drawing of
the picture), reference (another picture of the same category, colour and pattern) and style (one of another category in
the same colour and pattern). Splits and held-out combinations are the catalogue's.

`open_matches` gives the same pictures, half of them with wrong captions, to learn relevance from."""

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from openm6.core.images import sketch
from openm6.data.store import ComputedRecords, Record, Records, StoredRecords, cached, write_records
from openm6.worlds import phrases
from openm6.worlds.draw import SIDE, STUDIO, VALUES, Item, Placed, draw_picture
from openm6.worlds.pictured import SPLITS, combinations, in_threads, with_pictures

VERSION = 1  # of the records: see `pictured.drawn`

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
        rows: list[Record] = []

        def drawn() -> Iterator[Record]:
            draw = partial(picture, seed, split)
            for item, record in in_threads(draw, count, f"drawing the {split} pictures of the studio"):
                items.append(item)
                yield {"image": record.pop("image")}
                rows.append(record)

        write_records(folder / "pictures", drawn())
        write_records(folder / "records", _pointing(items, rows, seed))

    folder = cached("studio", {"version": VERSION, "split": split, "seed": seed, "pictures": count}, make)
    places = {"picture": "image", "reference_picture": "reference", "style_picture": "style"}
    return with_pictures(StoredRecords(folder / "pictures"), StoredRecords(folder / "records"), places)


def open_matches(split: str, seed: int = 0, pictures: int | None = None) -> Records:
    """Studio pictures with a right caption, or one that is wrong in a single attribute: image, caption (six),
    verdict_relevance (1 or 0, half of each) and match (是 or 否, the same). Wrong captions name combinations of the
    split alone, as right ones do."""
    studio = open_studio(split, seed, pictures)

    def match(index: int) -> Record:
        record = studio[index]
        caption = record["caption"]
        rng = np.random.default_rng([seed, SPLITS.index(split), index, 2])
        right = bool(rng.random() < 0.5)
        if not right:
            item = Item(record["category"], record["colour"].removesuffix("色"), record["pattern"])
            groups = _near(item, split)
            others = groups[rng.integers(len(groups))]
            caption = phrases.captions((others[rng.integers(len(others))],), "", rng)
        return {
            "_where": f"demo:matches/{split}#{index}", "image": record["image"], "caption": caption,
            "verdict_relevance": int(right), "match": "是" if right else "否",
        }  # fmt: skip

    return ComputedRecords(len(studio), ("image", "caption", "verdict_relevance", "match"), match)


@cache
def _near(item: Item, split: str) -> tuple[tuple[Item, ...], ...]:
    """For each attribute the items of a split that differ in it alone; all others for an item without any."""
    every = (
        tuple(o for o in combinations(split) if replace(o, **{name: getattr(item, name)}) == item and o != item)
        for name in VALUES
    )
    return tuple(some for some in every if some) or (tuple(o for o in combinations(split) if o != item),)


def _pointing(items: list[Item], rows: list[Record], seed: int) -> Iterator[Record]:
    """The records with the numbers of their own picture, of a similar one and of one in its style (else its own)."""
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

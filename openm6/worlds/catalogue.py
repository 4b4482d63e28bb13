"""The demo catalogue: generated pictures of goods with captions, questions, titles, slogans and tables.

A fifth of the (category, colour, pattern) combinations is held out: no training picture or text shows one of them, and
every item of a test picture is one of them. Each category, colour and pattern, and each pair of two of these, occurs in
training. The same seed gives the same bytes.

Eight views, by `open_catalogue(view, split)` or as a source `demo:VIEW/SPLIT`:

    catalogue   one record a picture: image, caption (six), title, slogan, attributes (one row an item), objects,
                relation (of the first item to the second), and category, colour, pattern of the first item
    items       one record a picture with a single item: image, caption (six), category, colour, pattern
    studio      other pictures of single items, as in a shop: large, upright, hardly any noise, bold patterns; with
                caption (six), category, colour, pattern, and conditions for drawing (worlds/studio.py)
    matches     of these, image and caption (six), half of them wrong in one attribute, with verdict_relevance 1 or 0
    pairs       two records for a picture of two items, one each: image, place (its side), category, colour, pattern
    questions   one record a question: image, question, answer, kind, detail, objects
    relations   of the questions, those about the relation of two items
    texts       text alone: text, kind (caption, title, slogan, sentence)

`without=8` leaves out all pictures and texts that show or name the eighth category: a model trained on the rest has
never met it.

Splits: train; validation (new pictures of trained combinations); test (held-out combinations)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from openm6.core.errors import UsageError, suggest
from openm6.data.store import Record, Records, StoredRecords, cached, check_split, iterate, shown, write_records
from openm6.worlds import phrases
from openm6.worlds.draw import CATEGORIES, Item, Placed, draw_picture
from openm6.worlds.phrases import OPPOSITE, attributes_in, same_attributes
from openm6.worlds.pictured import HELD_OUT, PICTURES, SPLITS, Pictured, combinations

__all__ = ["HELD_OUT", "PICTURES", "SPLITS", "VIEWS", "attributes_in", "build", "open_catalogue", "same_attributes"]

VERSION = 5
"""Version of the generated records; increase it when the same seed gives other records, so that old caches are not
used."""

VIEWS = ("catalogue", "items", "matches", "pairs", "questions", "relations", "studio", "texts")


TWO_OBJECTS = 0.3
"""Fraction of the pictures with two items."""


def picture(seed: int, split: str, index: int) -> Record:
    """The record of one picture, determined by its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    every = combinations(split)
    items: tuple[Item, ...] = (every[rng.integers(len(every))],)
    relation = ""
    if rng.uniform() < TWO_OBJECTS:
        other = every[rng.integers(len(every))]
        while other.category == items[0].category:
            other = every[rng.integers(len(every))]
        items, relation = (*items, other), tuple(OPPOSITE)[rng.integers(4)]
    image = draw_picture(_place(items, relation, rng), rng)
    first = items[0]
    return {
        "_where": f"demo:catalogue/{split}#{index}",
        "image": image,
        "caption": phrases.captions(items, relation, rng),
        "title": phrases.title(items, rng),
        "slogan": phrases.slogan(items, rng),
        "attributes": phrases.table(items),
        "category": first.category,
        "colour": first.colour + "色",
        "pattern": first.pattern,
        "objects": len(items),
        "relation": relation,
        "questions": [[q.question, q.answer, q.kind, q.detail] for q in phrases.questions(items, relation, rng)],
        "sentences": [phrases.sentence(item, rng) for item in items for _ in range(2)],
    }


def _place(items: tuple[Item, ...], relation: str, rng: np.random.Generator) -> list[Placed]:
    """Places of the items: one anywhere inside the picture, two on their sides of it."""
    if len(items) == 1:
        size = rng.uniform(0.45, 0.85)
        free = (1 - size) / 2 + 0.03
        return [Placed(items[0], 0.5 + rng.uniform(-free, free), 0.5 + rng.uniform(-free, free), size)]
    placed = []
    for item, side in zip(items, (relation, OPPOSITE[relation]), strict=True):
        size = rng.uniform(0.35, 0.5)
        along = 0.25 + rng.uniform(-0.03, 0.03)
        across = 0.5 + rng.uniform(-1, 1) * (0.5 - size / 2)
        along = along if side in ("左边", "上面") else 1 - along
        x, y = (along, across) if side in ("左边", "右边") else (across, along)
        placed.append(Placed(item, x, y, size))
    return placed


def build(split: str, seed: int = 0, pictures: int | None = None) -> dict[str, Records]:
    """All views of a split, generated at the first call (two milliseconds a picture), then from the cache."""
    count = PICTURES[split] if pictures is None else pictures
    key = {"version": VERSION, "split": split, "seed": seed, "pictures": count}

    def make(folder: Any) -> None:
        rows: list[Record] = []

        def drawn() -> Iterator[Record]:
            with ThreadPoolExecutor() as pool:
                records = pool.map(partial(picture, seed, split), range(count))
                for record in shown(records, count, f"drawing the {split} pictures"):
                    rows.append({k: v for k, v in record.items() if k != "image"})
                    yield {k: v for k, v in record.items() if k not in ("questions", "sentences")}

        write_records(folder / "catalogue", drawn())
        write_records(folder / "items", _item_rows(split, rows))
        write_records(folder / "pairs", _pair_rows(split, rows))
        questions = list(_question_rows(split, rows))
        write_records(folder / "questions", questions)
        write_records(folder / "relations", (q for q in questions if q["kind"] == "relation"))
        write_records(folder / "texts", _text_rows(split, rows))

    folder = cached("catalogue", key, make)
    views = {view: StoredRecords(folder / view) for view in VIEWS if view not in ("studio", "matches")}
    return {
        view: Pictured(views["catalogue"], rows, {"picture": "image"}) if "picture" in rows.columns else rows
        for view, rows in views.items()
    }


def _item_rows(split: str, rows: list[Record]) -> Iterator[Record]:
    for number, row in enumerate(rows):
        if row["objects"] == 1:
            told = {name: row[name] for name in ("caption", "category", "colour", "pattern")}
            yield {"_where": f"demo:items/{split}#{number}", "picture": number, **told}


def _pair_rows(split: str, rows: list[Record]) -> Iterator[Record]:
    for number, row in enumerate(rows):
        if row["objects"] == 2:
            places = row["relation"], OPPOSITE[row["relation"]]
            for place, item in zip(places, row["attributes"], strict=True):
                yield {
                    "_where": f"demo:pairs/{split}#{number}.{place}", "picture": number, "place": place,
                    "category": item["品类"], "colour": item["颜色"], "pattern": item["图案"],
                }  # fmt: skip


def _question_rows(split: str, rows: list[Record]) -> Iterator[Record]:
    for number, row in enumerate(rows):
        for place, (question, answer, kind, detail) in enumerate(row["questions"]):
            yield {
                "_where": f"demo:questions/{split}#{number}.{place}", "picture": number, "question": question,
                "answer": answer, "kind": kind, "detail": detail, "objects": row["objects"],
            }  # fmt: skip


def _text_rows(split: str, rows: list[Record]) -> Iterator[Record]:
    """Distinct texts."""
    seen: set[str] = set()
    for row in rows:
        texts = [("caption", row["caption"][0]), ("title", row["title"]), ("slogan", row["slogan"])]
        for kind, text in texts + [("sentence", text) for text in row["sentences"]]:
            if text not in seen:
                yield {"_where": f"demo:texts/{split}#{len(seen)}", "text": text, "kind": kind}
                seen.add(text)


class _Some:
    """The records at the given places."""

    def __init__(self, records: Records, places: list[int]):
        self._records, self._places = records, places
        self.columns = records.columns

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._places[index]]


def _without(views: Mapping[str, Records], view: str, category: str) -> Records:
    """The records of a view that neither show nor name a category."""

    def shows(record: Record) -> bool:
        return any(row["品类"] == category for row in record["attributes"])

    if view == "texts":
        return _Some(views[view], [i for i, r in enumerate(iterate(views[view])) if category not in r["text"]])
    left_out = {number for number, record in enumerate(iterate(views["catalogue"])) if shows(record)}
    numbers = (int(r["_where"].partition("#")[2].partition(".")[0]) for r in iterate(views[view]))
    return _Some(views[view], [i for i, number in enumerate(numbers) if number not in left_out])


def open_catalogue(
    view: str = "catalogue",
    split: str = "train",
    seed: int = 0,
    pictures: int | None = None,
    without: int | None = None,
) -> Records:
    """The records of one view (see above) of one split. Raises UsageError for an unknown view, split or category."""
    if view not in VIEWS:
        raise UsageError(f"The demo data has no part {view!r}.{suggest(view, VIEWS)} It has: {', '.join(VIEWS)}.")
    check_split("The demo data has", split, SPLITS)
    if view in ("studio", "matches"):
        from openm6.worlds.studio import Matches, open_studio

        if without:
            raise UsageError(f"without is not for {view}.")
        studio = open_studio(split, seed, pictures)
        return studio if view == "studio" else Matches(studio, split, seed)
    views = build(split, seed, pictures)
    if not without:
        return views[view]
    if without > len(CATEGORIES):
        raise UsageError(f"without is {without}; there are {len(CATEGORIES)} categories, counted from 1.")
    return _without(views, view, CATEGORIES[without - 1])

"""The items of a batch of texts with their texts or reasons: texts.csv and the contents of the review page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from openm6.core.errors import DataError
from openm6.core.files import whole_lines, write_file
from openm6.core.images import open_image
from openm6.data.bundled import plain_picture
from openm6.data.columns import SlotView
from openm6.data.rejects import Reject
from openm6.data.source import Source
from openm6.data.store import HIDDEN, Record
from openm6.data.writers import write_csv
from openm6.studio.review import REJECTS, place_of, rows_of
from openm6.tasks.task import Task

BROKEN, TABLE = "broken.jsonl", "texts.csv"
OWN = ("rank", "text", "reason")

PICTURE_SIDE = 320
"""Longer side of a picture on the review page, in pixels."""

_PICTURE = Task.from_instruction("[image:image|drop=1] -> [text:text]").left()


@dataclass(frozen=True, slots=True)
class Item:
    """A row of the source.

    number   among the records, -1 for an unreadable row
    texts    the kept texts, as lines of candidates.jsonl
    reason   why there are none, "" if there are some
    """

    number: int
    id: str
    record: Record
    texts: Sequence[Mapping[str, Any]]
    reason: str


def items_of(output: Path, source: Source, id_column: str) -> Iterator[Item]:
    """Every row of the source in order, unreadable rows included. The id is the value of `id_column`, or the number
    from 1."""
    texts, broken = defaultdict(list), defaultdict(list)
    for row in rows_of(output):
        if row["rank"]:
            texts[row["prompt"]].append(row)
    for row in whole_lines(output / BROKEN):
        broken[row["prompt"]].append(row["reason"])
    refused = {row["where"]: row["reason"] for row in whole_lines(output / REJECTS)}
    number = 0
    for record in source.rows():
        if isinstance(record, Reject):
            yield Item(-1, "", {}, (), record.reason)
            continue
        reason = refused.get(place_of(source, number, record)) or "; ".join(dict.fromkeys(broken[number]))
        known = text_of(record.get(id_column) if id_column else number + 1)
        yield Item(number, known, record, texts[number], "" if texts[number] else reason)
        number += 1


def write_table(path: Path, items: Sequence[Item], id_column: str, columns: Sequence[str]) -> None:
    """Write a CSV with a row per text and one per item without any."""
    name = id_column or "item"
    shown = {column: f"item {column}" if column in OWN else column for column in columns if column != id_column}

    def rows() -> Iterator[dict[str, Any]]:
        for item in items:
            cells = {name: item.id, **{shown[column]: item.record.get(column) for column in shown}}
            for row in item.texts:
                yield {**cells, "rank": row["rank"], "text": row["said"]}
            if not item.texts:
                yield {**cells, "reason": item.reason}

    write_csv(path, [name, *shown.values(), *OWN], rows)


def goods_pictures(task: Task, mapping: Mapping[str, str], source: Source) -> SlotView:
    """The view of an item's picture: the column that the task reads (by its `mapping` of slots), else a column
    recognized by its name or values; without one the view is empty."""
    read = next((mapping[name] for name in task.inputs if task.slots[name].type == "image" and name in mapping), None)
    return SlotView(_PICTURE, {"image": read}) if read else SlotView.of(_PICTURE, source)


def page_items(output: Path, items: Sequence[Item], pictures: SlotView, id_column: str) -> Iterator[dict[str, Any]]:
    """The items in the format of `write_review`; their pictures are saved as thumbnails."""
    hidden = {id_column, pictures.mapping.get("image"), *HIDDEN}
    for item in items:
        yield {
            "id": item.id,
            "shown": {k: text_of(v) for k, v in item.record.items() if k not in hidden and not isinstance(v, bytes)},
            "pictures": _saved_picture(output / "pictures" / f"{item.number:06d}.jpg", item.record, pictures),
            "candidates": [{"file": row["file"], "said": row["said"]} for row in item.texts],
            "reason": item.reason,
        }


def _saved_picture(file: Path, record: Record, view: SlotView) -> list[str]:
    """The name of the saved thumbnail, in a list that is empty for an item without a readable picture."""
    try:
        image = open_image(plain_picture(view(record).get("image")), draft=(PICTURE_SIDE, PICTURE_SIDE))
    except DataError:
        return []
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    file.parent.mkdir(exist_ok=True)
    write_file(file, lambda draft: image.save(draft, "JPEG", quality=85))
    return [f"{file.parent.name}/{file.name}"]


def text_of(value: Any) -> str:
    """A cell as readable text; the parts of a table or list one after the other."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}:{text_of(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " · ".join(map(text_of, value))
    return "" if value is None else str(value)

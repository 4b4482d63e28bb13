"""The items of a batch of product copy: inputs and facts of a row, rejected rows, texts.csv, review page."""

from __future__ import annotations

import hashlib
import html
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from openm6.core.errors import ContextLengthError, DataError
from openm6.core.files import whole_lines, write_file
from openm6.core.images import open_image
from openm6.data.bundled import plain_picture
from openm6.data.columns import SlotView
from openm6.data.rejects import Reject
from openm6.data.source import Source
from openm6.data.store import HIDDEN, Record
from openm6.data.writers import write_csv
from openm6.studio.review import REJECTS, place_of, rows_of
from openm6.tasks.numbers import narrow, plain
from openm6.tasks.slots.table import cells_of
from openm6.tasks.task import Task

BROKEN, TABLE = "broken.jsonl", "texts.csv"
OWN = ("rank", "text", "reason")

PICTURE_SIDE = 320
"""Longer side of a picture on the review page, in pixels."""

_PICTURE = Task.from_instruction("[image:image|drop=1] -> [text:text]").without_target()

View = Callable[[Record], Record]
"""A function from a record to its values by slot of a task."""

EMPTY = frozenset(
    ("无", "暂无", "没有", "未知", "不详", "待定", "待补充", "待确认", "暂缺", "缺失", "空", "未填", "未填写",
     "none", "null", "nil", "nan", "n/a", "#n/a", "n.a.", "tbd", "#value!", "#ref!")
)  # fmt: skip
"""Spellings of a missing value in a cell, normalized; cells without a letter or digit (-, /, ?) are missing too."""


def is_empty(cell: Any) -> bool:
    said = plain(str(cell)).strip()
    return cell is None or said in EMPTY or not any(map(str.isalnum, said))


def asked_of(task: Task, view: View, record: Record) -> dict[str, Any]:
    """The inputs of the task for an item, by slot: HTML entities decoded, full-width digits normalized."""
    given: dict[str, Any] = {}
    for name, value in view(record).items():
        if name not in task.inputs or value is None or value == "":
            continue
        if task.slots[name].type == "table" and isinstance(value, str):
            with suppress(ValueError):  # an invalid table is rejected when it is encoded
                value = json.loads(value)
        given[name] = _clean(value) if task.slots[name].type in ("table", "text") else value
    return given


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return narrow(html.unescape(value))
    if isinstance(value, Mapping):
        return {name: _clean(cell) for name, cell in value.items()}
    return [_clean(one) for one in value] if isinstance(value, list) else value


def facts_of(task: Task, asked: Record) -> tuple[list[tuple[str, str]], list[str]]:
    """The non-empty cells of an item as (column, value), and its texts. A slot in a group says how to write, as a
    length or a style does: it is no fact."""
    cells, texts = [], []
    for name in task.inputs:
        slot = task.slots[name]
        if slot.type == "table":
            cells += [(column, cell) for column, cell in cells_of(asked.get(name)) if not is_empty(cell)]
        elif slot.type == "text" and not slot.is_grouped and asked.get(name) is not None:
            texts.append(str(asked[name]))
    return cells, texts


def closed_values(task: Task, view: View, source: Iterable[Record], most: int) -> set[str]:
    """Values of two to 40 characters, without digits, of the table columns with at most `most` distinct ones."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in source:
        with suppress(DataError):  # rejected later, when the item is processed
            for column, cell in facts_of(task, asked_of(task, view, record))[0]:
                if 2 <= len(cell.strip()) <= 40 and not any(map(str.isdigit, cell)) and len(found[column]) <= most:
                    found[column].add(cell.strip())
    return {value for values in found.values() if len(values) <= most for value in values}


def repeated_rows(source: Source, id_column: str) -> dict[int, str]:
    """The numbers of the records that repeat an earlier one or its id, each with the reason for its rejection."""
    found: dict[int, str] = {}
    first: dict[Any, int] = {}
    for number, record in enumerate(source):
        row = repr([(name, value) for name, value in record.items() if not name.startswith("_")])
        marks: dict[Any, str] = {hashlib.sha256(row.encode(errors="surrogatepass")).digest(): "is equal to"}
        if id_column and not is_empty(record.get(id_column)):
            marks["id", str(record[id_column]).strip()] = f"has the same {id_column} as"
        for mark, words in marks.items():
            before = first.setdefault(mark, number)
            if before != number and number not in found:
                where, other = (place_of(source, n, source[n]) for n in (number, before))
                found[number] = f"{_named(where, record, id_column)} {words} {other}, for which the texts are written."
    return found


def explain_refusal(task: Task, view: View, id_column: str, error: DataError, where: str, record: Record) -> str:
    """The reason why an item is rejected; for a text that is too long it names the longest cell."""
    if not isinstance(error, ContextLengthError):
        return str(error)
    cells, texts = facts_of(task, asked_of(task, view, record))
    column, cell = max([*cells, *(("its text", text) for text in texts)], key=lambda one: len(one[1]))
    name = _named(where, record, id_column)
    return f"{name} is too long for the model: shorten it, above all {column} ({len(cell)} characters)."


def _named(where: str, record: Record, id_column: str) -> str:
    return f"{where} ({id_column} {record.get(id_column)})" if id_column else where


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
            "id": item.id, "candidates": [{"file": row["file"], "said": row["said"]} for row in item.texts],
            "reason": item.reason,
            "shown": {k: text_of(v) for k, v in item.record.items() if k not in hidden and not isinstance(v, bytes)},
            "pictures": _saved_picture(output / "pictures" / f"{item.number:06d}.jpg", item.record, pictures),
        }  # fmt: skip


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

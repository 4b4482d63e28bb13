"""The items of a product table: their inputs to a task, their facts, and which of them are rejected."""

from __future__ import annotations

import hashlib
import html
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from openm6.core.errors import ContextLengthError, DataError
from openm6.data.source import Source
from openm6.data.store import Record
from openm6.studio.review import place_of
from openm6.tasks.numbers import narrow, plain
from openm6.tasks.slots.table import cells_of
from openm6.tasks.task import Task

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
    """The non-empty cells of an item as (column, value), and its texts."""
    cells, texts = [], []
    for name in task.inputs:
        if task.slots[name].type == "table":
            cells += [(column, cell) for column, cell in cells_of(asked.get(name)) if not is_empty(cell)]
        elif task.slots[name].type == "text" and asked.get(name) is not None:
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

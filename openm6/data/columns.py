"""Which column of the data fills which slot of a task, and a record seen through that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from openm6.data.files import is_remote, join, read_file
from openm6.data.store import Record, Records
from openm6.errors import DataError, UsageError, suggest
from openm6.images import PICTURES

if TYPE_CHECKING:
    from openm6.tasks.task import Task

_SYNONYMS = (
    (
        "image",
        "img",
        "picture",
        "photo",
        "image_path",
        "img_path",
        "image_file",
        "image_bytes",
        "file_name",
        "filename",
        "图片",
    ),
    ("question", "query", "问题"),
    ("answer", "answers", "response", "答案", "回答"),
    ("caption", "captions", "text", "texts", "description", "描述"),
    ("text", "body", "content", "sentence", "正文", "caption", "title"),
    ("label", "labels", "class", "category", "cls", "类别", "标签"),
    ("title", "titles", "标题"),
    ("table", "attributes", "属性"),
)
"""Names that mean the same, the most likely first; a task's own `aliases` go before them."""


@dataclass(frozen=True, slots=True)
class SlotView:
    """Turns a record of the data into one whose keys are the task's slots (other columns stay as they are)."""

    task: Task
    mapping: Mapping[str, str]

    @classmethod
    def of(cls, task: Task, records: Records, columns: Mapping[str, str] | None = None) -> SlotView:
        """The view of these records for this task. Raises UsageError as `map_columns` does."""
        sample = [records[i] for i in range(min(8, len(records)))]
        return cls(task, map_columns(task, records.columns, columns or {}, sample))

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Record:
        """The record by slots.

        Of a list of texts `rng` draws one; without it an input takes the first, and an output keeps the list (all
        are right). A picture's path is completed. Raises DataError for one that may not be read.
        """
        seen = dict(record)
        for name, column in self.mapping.items():
            value = record.get(column)
            kind = self.task.slots[name].type
            if kind == "image":
                value = _picture(value, str(record.get("_root") or ""))
            elif kind in ("text", "label"):
                value = _text(value)
                if isinstance(value, list) and (rng is not None or name in self.task.inputs):
                    value = value[0 if rng is None else int(rng.integers(len(value)))]
            if value is None:
                seen.pop(name, None)
            else:
                seen[name] = value
        return seen


def map_columns(
    task: Task, columns: Iterable[str], mapping: Mapping[str, str], sample: Iterable[Record] = ()
) -> dict[str, str]:
    """The column for every slot of the task: as `mapping` says, else the same name, else an alias, else the only
    column of the slot's type (told from `sample` records).

    Raises UsageError that names the slot, the columns there are, and how to map.
    """
    columns, rows = list(columns), list(islice(sample, 8))
    for slot, column in mapping.items():
        if slot not in task.slots:
            raise UsageError(
                f"columns.{slot}: the task {task.name} has no slot {slot!r}.{suggest(slot, list(task.slots))} "
                f"It has: {', '.join(task.slots)}."
            )
        if column not in columns:
            raise UsageError(
                f"columns.{slot}: the data has no column {column!r}.{suggest(column, columns)} "
                f"It has: {', '.join(columns)}."
            )
    chosen = dict(mapping)
    steps: tuple[Callable[[str], list[str]], ...] = (
        lambda slot: [slot],
        lambda slot: list(task.aliases.get(slot, ())),
        lambda slot: _synonyms(slot, task.slots[slot].type),
        lambda slot: _only_of_type(task, slot, chosen, columns, rows),
    )
    for candidates in steps:
        for slot in task.slots:
            if slot not in chosen and task.slots[slot].type != "vector":
                free = [c for c in candidates(slot) if c in columns and c not in chosen.values()]
                if free:
                    chosen[slot] = free[0]
    for slot, what in task.slots.items():
        if slot not in chosen and not what.drop and what.type != "vector":
            raise UsageError(
                f"The task {task.name} needs {slot} ([{task.slots[slot].type}:{slot}]), and none of the data's columns "
                f"({', '.join(columns)}) is taken for it: say which, "
                f"by columns: {{{slot}: {columns[0] if columns else 'COLUMN'}}}."
            )
    return {slot: chosen[slot] for slot in task.slots if slot in chosen}


def _synonyms(slot: str, kind: str) -> list[str]:
    names = [name for group in _SYNONYMS if slot in group for name in group]
    if kind in ("image", "label", "table"):
        names += next(group for group in _SYNONYMS if group[0] == kind)
    return names


def _only_of_type(
    task: Task, slot: str, chosen: Mapping[str, str], columns: list[str], rows: list[Record]
) -> list[str]:
    """The one free column whose values look like the slot's type, if the slot is the only free one of that type."""
    kind = task.slots[slot].type
    if sum(s not in chosen and task.slots[s].type == kind for s in task.slots) > 1:
        return []
    fitting = [c for c in columns if c not in chosen.values() and _looks_like([r.get(c) for r in rows], kind)]
    return fitting if len(fitting) == 1 else []


def _looks_like(values: list[Any], kind: str) -> bool:
    values = [v for v in values if v is not None]
    if not values:
        return False
    if kind == "image":
        return all(isinstance(v, bytes) or (isinstance(v, str) and v.lower().endswith(PICTURES)) for v in values)
    if kind == "text":
        texts = [t for v in values for t in (v if isinstance(v, list) else [v])]
        return all(isinstance(t, str) and not t.lower().endswith(PICTURES) for t in texts)
    if kind == "label":
        return all(isinstance(v, (str, int)) and not str(v).lower().endswith(PICTURES) for v in values)
    return kind == "table" and all(isinstance(v, (dict, list)) for v in values)


def _text(value: Any) -> Any:
    """Numbers as text; an empty list is no value."""
    if isinstance(value, list):
        return [_text(v) for v in value] or None
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _picture(value: Any, root: str) -> Any:
    """A path completed by its root; a remote picture as bytes, read only from below the root."""
    if isinstance(value, list) and value and not isinstance(value[0], (int, list)):  # numbers are a picture's codes
        if len(value) > 1:
            raise DataError(f"A record holds a list of {len(value)} pictures where the task reads one.")
        value = value[0]
    if not isinstance(value, str) or not value:
        return value
    if is_remote(value):
        if not (is_remote(root) and value.startswith(root.rstrip("/") + "/")) or ".." in value.split("/"):
            raise DataError(
                f"The picture {value} is elsewhere: to have it read, name the beginning of such addresses by images."
            )
        return read_file(value)
    path = join(root, value) if root else value
    return read_file(path) if is_remote(path) else path

"""Duplicate records: within one source, and between evaluation and training data.

Texts are compared in normal form (as labels are), pictures by the content of their files, all else as JSON."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openm6.core.files import plain
from openm6.data.columns import SlotView, picture_path
from openm6.data.files import is_remote
from openm6.data.store import Record
from openm6.tasks.slots.label import normalize_label

if TYPE_CHECKING:
    from openm6.data.source import Source
    from openm6.tasks.task import Task


class Overlap(NamedTuple):
    """`found` of `total` records have the inputs of a training record; `first` is the place of the first of them."""

    found: int
    total: int
    first: str


def count_overlap(
    task: Task,
    train: Source,
    train_columns: Mapping[str, str],
    test: Source,
    test_columns: Mapping[str, str],
    limit: int | None = None,
    most: int | None = None,
) -> Overlap:
    """The number of records that `find_overlap` finds among the first `limit` of `test`."""
    found = find_overlap(task, train, train_columns, test, test_columns, limit, most)
    total = len(test) if limit is None else min(limit, len(test))
    return Overlap(len(found), total, str(test[min(found)].get("_where", min(found))) if found else "")


def find_overlap(
    task: Task,
    train: Source,
    train_columns: Mapping[str, str],
    test: Source,
    test_columns: Mapping[str, str],
    limit: int | None = None,
    most: int | None = None,
) -> set[int]:
    """Indices of those of the first `limit` records of `test` whose task inputs equal those of one of the first `most`
    records of `train`. A task without inputs is compared by its outputs. No records of `train` are held in memory, and
    of `test` a digest of each.

    Pictures are compared by size first, so that only candidates are read. Raises UsageError where a slot has no column.
    """
    names = task.inputs or task.outputs
    pictures = any(task.slots[name].type == "image" for name in names)
    seen, tested = SlotView.of(task, train, train_columns), SlotView.of(task, test, test_columns)
    total = len(test) if limit is None else min(limit, len(test))
    rough: dict[bytes, list[int]] = {}
    for number in range(total):
        rough.setdefault(digest(tested, test[number], names, content=False), []).append(number)
    exact: dict[bytes, dict[bytes, list[int]]] = {}
    found: set[int] = set()
    for record in islice(train, most):
        key = digest(seen, record, names, content=False)
        if not key or key not in rough:
            continue
        if not pictures:
            found.update(rough[key])
            continue
        if key not in exact:
            exact[key] = {}
            for number in rough[key]:
                exact[key].setdefault(digest(tested, test[number], names), []).append(number)
        found.update(exact[key].get(digest(seen, record, names), ()))
    return found


class Twins:
    """Counts duplicate records of one source, in 16 bytes a record."""

    def __init__(self, task: Task, view: SlotView):
        self._view, self._outputs = view, [n for n in task.outputs if task.slots[n].type != "vector"]
        self._inputs = task.inputs
        self._given, self._wanted, self._places = array("Q"), array("Q"), array("Q")

    def add(self, number: int, record: Record) -> None:
        """Add record `number` of the source."""
        for names, numbers in ((self._inputs, self._given), (self._outputs, self._wanted)):
            numbers.append(int.from_bytes(digest(self._view, record, names)[:8]))
        self._places.append(number)

    def count(self) -> dict[str, dict[str, Any]]:
        """`duplicates`: records equal to an earlier one; `conflicts`: inputs with several answers; each with the
        numbers of the first two records."""
        given, wanted, places = (np.array(a, np.uint64) for a in (self._given, self._wanted, self._places))
        order = np.lexsort((places, wanted, given))
        given, wanted, places = given[order], wanted[order], places[order]
        alike = given[1:] == given[:-1]
        same = alike & (wanted[1:] == wanted[:-1])
        other = alike & ~same if self._inputs else np.zeros_like(alike)
        counts = {"duplicates": int(same.sum()), "conflicts": len(np.unique(given[1:][other]))}
        found = {}
        for name, pairs in (("duplicates", same), ("conflicts", other)):
            starts = np.flatnonzero(pairs)
            first = min(((int(places[i]), int(places[i + 1])) for i in starts), default=())
            found[name] = {"count": counts[name], "first": sorted(first)}
        return found


def digest(view: SlotView, record: Record, names: Iterable[str], content: bool = True) -> bytes:
    """A hash of 16 bytes, equal where these slots of two records are; without `content` pictures count by size alone.
    Empty for a record without any of the slots."""
    hashed, parts = hashlib.blake2b(digest_size=16), 0
    for name in names:
        value, kind = record.get(view.mapping.get(name, "")), view.task.slots[name].type
        if value is None:
            continue
        if kind == "image":
            part = _picture(value, record, content)
        elif kind in ("text", "label"):
            texts = value if isinstance(value, list) else [value]
            if name in view.task.inputs:
                texts = texts[:1]
            part = json.dumps(sorted(normalize_label(str(text)) for text in texts)).encode()
        else:
            part = json.dumps(value, sort_keys=True, default=plain).encode()
        hashed.update(f"{name} {len(part)} ".encode() + part)
        parts += 1
    return hashed.digest() if parts else b""


def _picture(value: Any, record: Record, content: bool) -> bytes:
    """Content or size of a picture; the name of a remote or missing one."""
    if isinstance(value, str):
        path = picture_path(value, str(record.get("_root") or ""))
        if is_remote(path):
            return path.encode()
        try:
            if content:
                with open(path, "rb") as file:
                    return hashlib.file_digest(file, "sha256").digest()
            return str(Path(path).stat().st_size).encode()
        except OSError:
            return path.encode()
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest() if content else str(len(value)).encode()
    return json.dumps(value, sort_keys=True, default=str).encode()

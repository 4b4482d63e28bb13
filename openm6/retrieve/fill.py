"""Filling an index: embeddings of the records of a source by a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import DataError, UsageError
from openm6.data.columns import SlotView, picture_path, require_columns
from openm6.data.files import expand
from openm6.data.readers import format_of
from openm6.data.rejects import OnReject, Reject
from openm6.data.source import Source, open_source
from openm6.data.store import Record
from openm6.inference.session import Session
from openm6.retrieve.columns import convert_at, id_of, type_of, types_of
from openm6.retrieve.index import Index

BATCH = 512
"""Number of items stored per commit: an interruption loses at most these."""


@dataclass(slots=True)
class Filled:
    """Ids of a source's records.

    passed_over   items of the index that were skipped (`only_new`)
    repeated      rejected records that repeat the id of an earlier record
    """

    new: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)


def create_for(
    path: Path,
    session: Session,
    task: str,
    source: str,
    *,
    query_task: str | None = None,
    id_column: str = "",
    keep: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    dims: int | None = None,
    data_format: str | None = None,
    images: str | None = None,
) -> Index:
    """Create an empty index for the records of `source`, embedded by `task`; `query_task` embeds queries.

    `keep`: columns of the data to store and filter by, each a name or name:type (text, int, float, bool). Without a
    type it is inferred from the whole source (`types_of`).
    """
    for name in (task, query_task or task):
        if not session.task(name).embeds:
            raise UsageError(f"The task {name} gives no vector: an index needs a task with a vector output.")
    records = open_source(source, data_format, images)
    SlotView.of(session.task(task), records, columns or {})
    given = types_given(keep)
    require_columns(records.columns, [*given, *([id_column] if id_column else [])])
    types = {name: kind or ("string" if name == id_column else "") for name, kind in given.items()}
    types |= types_of(records, [n for n, kind in types.items() if not kind], _has_text_cells(source, data_format))
    about = {
        "model": str((session.path or Path()).resolve()), "task": task, "query_task": query_task or task,
        "id_column": id_column, "slots": dict(columns or {}),
    }  # fmt: skip
    return Index.create(path, dims or session.model.config.hidden_size, types, about)


def types_given(keep: Sequence[str]) -> dict[str, str]:
    """`["price:float", "colour"]` to `{"price": "float64", "colour": ""}`. Raises UsageError for an unknown type."""
    pairs = (name.partition(":") for name in keep)
    return {name: type_of(name, kind) if colon else "" for name, colon, kind in pairs}


def add_source(
    index: Index,
    session: Session,
    source: str,
    *,
    data_format: str | None = None,
    images: str | None = None,
    only_new: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_reject: OnReject | None = None,
    truncate: str | None = None,
) -> Filled:
    """Add the records of a source; items with the same id are replaced (`only_new`: skipped). The first of several
    records with one id counts, the others are rejected.

    `on_progress` gets the number of stored items and of all records after each batch, `on_reject` each bad record;
    without it the first one raises DataError. A stored column with the picture of the task holds its full path.
    `truncate`: see Session.run. Raises UsageError for a source without the index's columns.
    """
    about, id_column = index.about, index.about["id_column"]
    task = session.task(about["task"])
    records = open_source(source, data_format, images)
    view = SlotView.of(task, records, about["slots"])
    require_columns(records.columns, [*about["columns"], *([id_column] if id_column else [])])
    pictures = {column for slot, column in view.mapping.items() if task.slots[slot].type == "image"}
    for reject in records.rejected:
        _reject(DataError(reject.reason), reject.where, on_reject)
    known = index.ids() if only_new else set()
    filled, count = Filled(), 0
    named = _named(records, id_column, known, filled, on_reject)
    while batch := list(islice(named, BATCH)):
        rows: list[Any] = []  # the stored values of each record, or the DataError of a rejected one
        seen: list[Record] = []
        for name, record in batch:
            where = str(record.get("_where", name))
            kept = {**record, **{column: _full_path(record, column) for column in pictures}}
            try:
                row = [convert_at(where, key, kept.get(key), kind) for key, kind in about["columns"].items()]
                seen.append(view(record))
                rows.append(row)
            except DataError as error:
                rows.append(error)
        vectors = session.vectors(task, seen, dims=index.dims, on_error="return", truncate=truncate)
        good = []
        for (name, record), row in zip(batch, rows, strict=True):
            found: Any = row if isinstance(row, DataError) else next(vectors)
            if isinstance(found, DataError):
                _reject(found, str(record.get("_where", name)), on_reject)
            else:
                good.append((name, row, found))
        if not good:
            continue
        columns = {key: [row[place] for _, row, _ in good] for place, key in enumerate(about["columns"])}
        added = index.add([name for name, *_ in good], np.stack([vector for *_, vector in good]), columns)
        filled.new += added.new
        filled.replaced += added.replaced
        count += len(good)
        on_progress(count, len(records))
    return filled


def _has_text_cells(source: str, data_format: str | None) -> bool:
    """True if the source consists of files whose values are all text (CSV, TSV)."""
    try:
        return {format_of(path, data_format) for path in expand(source)} <= {"csv", "tsv"}
    except (UsageError, DataError):  # generated data
        return False


def _full_path(record: Record, column: str) -> Any:
    """The full path of a record's picture; other values unchanged."""
    value = record.get(column)
    return picture_path(value, str(record.get("_root") or "")) if isinstance(value, str) and value else value


def _reject(error: DataError, where: str, on_reject: OnReject | None) -> None:
    if on_reject is None:
        raise error
    on_reject(Reject(where, str(error)))


def _named(
    records: Source, id_column: str, known: set[str], filled: Filled, on_reject: OnReject | None
) -> Iterator[tuple[str, Record]]:
    """Every record to store with its id: the value of its column, else its place in the source.

    The first record of an id counts, so that a resumed build gives the same items."""
    met: set[str] = set()
    for number, record in enumerate(records):
        where = str(record.get("_where", number))
        try:
            name = id_of(where, record.get(id_column)) if id_column else where
            if name in met:
                filled.repeated.append(name)
                raise DataError(f"{where}: an earlier record has the id {name}; keep one of them.")
        except DataError as error:
            _reject(error, where, on_reject)
            continue
        met.add(name)
        if name in known:
            filled.passed_over.append(name)
        else:
            yield name, record

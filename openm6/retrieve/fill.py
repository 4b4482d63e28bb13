"""An index filled with what a task makes of the records of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from openm6.bundle import Bundle
from openm6.data.columns import SlotView
from openm6.data.source import Source, open_source
from openm6.data.store import Record
from openm6.errors import DataError, UsageError, suggest
from openm6.retrieve.index import Index

BATCH = 512
"""Items that are kept together: a kill loses at most so many that are not yet told as done."""


def create_for(
    path: Path,
    bundle: Bundle,
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
    """An empty index for what `task` makes of the records of `source`, asked by what `query_task` makes of questions.

    `keep`: columns of the data to filter by; their types are those of the first records.
    """
    for name in (task, query_task or task):
        if not bundle.task(name).embeds:
            raise UsageError(f"The task {name} gives no vector: an index is made by one that does.")
    records = open_source(source, data_format, images)
    SlotView.of(bundle.task(task), records, columns or {})
    for name in (*keep, *([id_column] if id_column else [])):
        if name not in records.columns:
            raise UsageError(
                f"The data has no column {name!r}.{suggest(name, list(records.columns))} "
                f"It has: {', '.join(records.columns)}."
            )
    about = {
        "model": str((bundle.path or Path()).resolve()), "task": task, "query_task": query_task or task,
        "id_column": id_column, "slots": dict(columns or {}),
    }  # fmt: skip
    sample = [record for record, _ in zip(records, range(256), strict=False)]
    kinds = {name: _kind_of(name, [record.get(name) for record in sample]) for name in keep}
    return Index.create(path, dims or bundle.model.config.hidden_size, kinds, about)


def add_source(
    index: Index,
    bundle: Bundle,
    source: str,
    *,
    data_format: str | None = None,
    images: str | None = None,
    only_new: bool = False,
    on_progress: Callable[[int], None] | None = None,
    on_reject: Callable[[str], None] | None = None,
) -> int:
    """Add the records of a source, or replace those whose ids are there (`only_new` passes those over).

    Returns how many were added. `on_progress` gets their number whenever a batch is kept, `on_reject` the reason of a
    bad record.
    """
    about = index.about
    task = bundle.task(about["task"])
    records = open_source(source, data_format, images)
    view = SlotView.of(task, records, about["slots"])
    known = index.ids() if only_new else set()
    done = 0
    for batch in _batches(_named(records, about["id_column"], known)):
        seen, good = [], []
        for name, record in batch:
            try:
                by_slot = view(record)
                bundle.prompt(task, by_slot)
            except DataError as error:
                if on_reject is None:
                    raise
                on_reject(str(error))
                continue
            seen.append(by_slot)
            good.append((name, record))
        if not good:
            continue
        vectors = np.stack(list(bundle.vectors(task, seen, dims=index.dims)))
        kept = {name: [record.get(name) for _, record in good] for name in about["columns"]}
        index.add([name for name, _ in good], vectors, kept)
        done += len(good)
        if on_progress:
            on_progress(done)
    return done


def _named(records: Source, id_column: str, known: set[str]) -> Iterator[tuple[str, Record]]:
    """Every record with its id: that of its column, else its place in the source; of one id the last one counts."""
    for number, record in enumerate(records):
        name = record.get(id_column) if id_column else record.get("_where", number)
        if name is None or name == "":
            raise DataError(f"{record.get('_where', number)} has no {id_column}, which is to be its id.")
        if str(name) not in known:
            yield str(name), record


def _batches(named: Iterator[tuple[str, Record]]) -> Iterator[list[tuple[str, Record]]]:
    while batch := dict(islice(named, BATCH)):
        yield list(batch.items())


def _kind_of(name: str, values: list[Any]) -> str:
    found = {type(value) for value in values if value is not None}
    for kind, types in (("bool", {bool}), ("int64", {int}), ("float64", {int, float}), ("string", {str})):
        if found and found <= types:
            return kind
    told = ", ".join(sorted(t.__name__ for t in found)) or "nothing"
    raise UsageError(f"The column {name} holds {told}: an index keeps texts, numbers, or true and false.")

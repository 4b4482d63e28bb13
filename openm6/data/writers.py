"""Writers of rows as CSV, JSON lines or Parquet, by file suffix."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from openm6.core.errors import UsageError
from openm6.core.extras import require
from openm6.core.files import dumps, plain

Rows = Callable[[], Iterator[dict[str, Any]]]
Writer = Callable[[Path, Sequence[str], Rows], None]

_ROWS = 1024  # of a row group of Parquet


def writer_for(path: Path, holds_vectors: bool = False) -> Writer:
    """The writer for a file suffix. Raises UsageError for an unknown one, and for vectors in a CSV."""
    ending = path.suffix.lower()
    if ending not in _WRITERS:
        raise UsageError(f"{path} ends in {ending or 'nothing'}: answers are written as {', '.join(_WRITERS)}.")
    if holds_vectors and ending == ".csv":
        raise UsageError(f"A CSV has no cells for vectors: name the output {path.stem}.parquet or {path.stem}.jsonl.")
    return _WRITERS[ending]


def write_csv(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write UTF-8 with a byte order mark, by which Excel tells it from GBK; lists as JSON, bytes in base64."""
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(columns)
        lines.writerows([_cell(row.get(column)) for column in columns] for row in rows())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if isinstance(value, str) else dumps(value, plain)


def write_jsonl(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write each row with its own keys."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(dumps(row, plain) + "\n" for row in rows())


def write_parquet(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write Parquet. A column whose values have several types, as in JSON, becomes a column of JSON texts."""
    require("parquet", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, pa.DataType] = dict.fromkeys(columns, pa.null())
    texts: set[str] = set()

    def array(column: str, group: list[dict[str, Any]], kind: pa.DataType | None = None) -> pa.Array:
        values = [row.get(column) for row in group]
        if column in texts:
            return pa.array([v if isinstance(v, str | None) else dumps(v, plain) for v in values], pa.string())
        return pa.array(values, kind)

    def groups() -> Iterator[list[dict[str, Any]]]:
        every = rows()
        while group := list(islice(every, _ROWS)):
            yield group

    settled = False
    while not settled:  # what an earlier group holds has to fit the type that a later one asked for
        before = dict(kinds)
        for group, column in ((group, column) for group in groups() for column in columns):
            try:
                both = [pa.schema([(column, kind)]) for kind in (kinds[column], array(column, group).type)]
                kinds[column] = pa.unify_schemas(both, promote_options="permissive").field(0).type
                array(column, group, kinds[column])
                unwritable = "struct<>" in str(kinds[column])
            except (pa.ArrowException, OverflowError):
                unwritable = True
            if unwritable:
                texts.add(column)
                kinds[column] = pa.string()
        settled = kinds == before
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(path, schema) as file:
        for group in groups():
            file.write_table(pa.table([array(c, group, kinds[c]) for c in columns], schema=schema))


_WRITERS: dict[str, Writer] = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}

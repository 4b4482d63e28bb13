"""Sources: data that a recipe or a command can name, with random access to records."""

import atexit
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from openm6.core.environment import NO_CACHE
from openm6.core.errors import DataError, UsageError, suggest
from openm6.core.files import dumps, lines_of
from openm6.data.digest import content_hash, json_hash
from openm6.data.files import expand, fingerprint, is_remote
from openm6.data.readers import files_of, format_of, read
from openm6.data.rejects import Reject, Rejects, place_of
from openm6.data.store import Record, Records, StoredRecords, cached, write_records

_CACHE_VERSION = 3  # increased when the same files give other records


class Source:
    """Named records: `len`, `[i]`, iteration, `columns`; `rejected` are the rows that reading left out.

    `window` is 0 where access to any record costs the same, else the number of neighbouring records that can be
    shuffled without reading everything (see `openm6.data.parquet`). `stamp` determines the content, where it is known
    without reading the records."""

    def __init__(
        self, name: str, records: Records, rejected: tuple[Reject, ...] = (), limit: int | None = None,
        window: int = 0, stamp: Any = None,
    ):  # fmt: skip
        self.name, self.rejected, self.window, self._stamp = name, rejected, window, stamp
        self._records = records
        self._length = len(records) if limit is None else min(limit, len(records))

    @property
    def columns(self) -> tuple[str, ...]:
        return self._records.columns

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._records[index % self._length]

    def __iter__(self) -> Iterator[Record]:
        return (self._records[i] for i in range(self._length))

    def rows(self) -> Iterator[Record | Reject]:
        """The records and, in order of their places (file:line, file#row), the rows that reading left out; rejects
        without a place come last."""
        waiting: dict[str, list[tuple[int, Reject]]] = {}
        for reject in self.rejected:
            file, number = place_of(reject.where)
            waiting.setdefault(file, []).append((number, reject))
        before = ""
        for record in self:
            file, number = place_of(str(record.get("_where", "")))
            if file != before:
                yield from (reject for _, reject in waiting.pop(before, ()))
                before = file
            some = waiting.get(file, [])
            while some and some[0][0] < number:
                yield some.pop(0)[1]
            yield record
        for file in [before, *waiting]:
            yield from (reject for _, reject in waiting.pop(file, ()))

    def content_hash(self) -> str:
        """The hash of the records and of the pictures that they name (`openm6.data.digest`). Generated data are
        identified by name, streamed files by name, size and time of change."""
        if self._stamp is not None:
            return json_hash([self._stamp, self._length])
        records = self._records
        if isinstance(records, StoredRecords) and self._length == len(records):
            return content_hash(self, records.folder)
        return content_hash(self)


def open_source(
    spec: str | Path,
    format: str | None = None,
    images_root: str | None = None,
    *,
    stream: bool = False,
    limit: int | None = None,
    rejects: Rejects | None = None,
) -> Source:
    """Open data by name.

    `demo:catalogue/train`, `demo:questions/test` (options: `?pictures=500&seed=1`), `market:copy/train`
    (`?records=500`), `scenes/train`, `shop:visits/train`, `tryon/test` and others that have an entry point (`SOURCES`),
    or a path, URL or glob in a format of `openm6.data.readers`. Files are read once into the cache (`$OPENM6_CACHE`,
    else ~/.cache/openm6) and again only when they change. With `stream` a Parquet source is read in place and never
    copied.

    Rows that cannot be used are counted in `rejects` when it is given, which raises DataError when they are too many.
    Raises UsageError for an unknown name, DataError for missing, damaged or empty data."""
    name = str(spec)
    if entry := _entry_of(name):
        if stream:
            raise UsageError(f"{name} is not streamed: stream is for Parquet files.")
        source: Source = entry.load()(name, limit)
        return source
    if stream:
        from openm6.data.parquet import ParquetRows

        rows = ParquetRows(name)
        stamp = [[Path(file).name, *fingerprint(file)[1:]] for file in files_of(name)]
        return Source(name, rows, limit=limit, window=rows.window, stamp=stamp)
    records, rejected = _through_cache(name, format, images_root)
    if rejects is not None:
        rejects.saw(len(records))
        for reject in rejected:
            rejects.count(reject.where, reject.reason, name)
    if len(records) == 0:
        why = f": {rejected[0].reason}" if rejected else "."
        raise DataError(f"{name} holds no usable record{why}")
    return Source(name, records, rejected, limit)


def check_source(name: str) -> None:
    """Raises the errors of `open_source` for unknown built-in data and for missing files. Files are not read;
    built-in data is opened, and drawn where it was not yet."""
    if _entry_of(name):
        open_source(name)
    elif not is_remote(name):
        _files(name)


def _files(name: str) -> list[str]:
    """The files of a source. Raises DataError where there is none, with the most similar built-in name."""
    try:
        return expand(name)
    except DataError as error:
        kind, colon, _ = name.partition(":")
        raise DataError(f"{error}{suggest(kind, sorted(_entries().names)) if colon else ''}") from None


SOURCES = "openm6.sources"
"""Group of entry points of packages that open data by a name of their own (`demo:...`, `pets/...`): a function of the
whole name and of `limit` that returns a Source."""


def _entry_of(name: str) -> EntryPoint | None:
    """The entry point that opens `WORD:...`, or `WORD/...` where there is no such file; None for any other name."""
    word = re.match(r"(\w+)[:/]", name)
    if not word or (name[word.end(1)] == "/" and Path(name.partition("?")[0]).exists()):
        return None
    return next(iter(_entries().select(name=word[1])), None)


def _entries() -> EntryPoints:
    """The entry points of SOURCES in all installed packages."""
    return _entries_on(tuple(sys.path))


@cache
def _entries_on(path: tuple[str, ...]) -> EntryPoints:
    return entry_points(group=SOURCES)  # reads the metadata of every package, which takes 20 ms


def _through_cache(name: str, format: str | None, images_root: str | None) -> tuple[StoredRecords, tuple[Reject, ...]]:
    kinds = [format_of(path, format) for path in _files(name)]
    # The name is in the key because the records' places (`_where`) contain it.
    key = [_CACHE_VERSION, name, kinds, format, images_root, str(Path.cwd()), [fingerprint(f) for f in files_of(name)]]

    def make(folder: Path) -> None:
        rejected: list[Reject] = []
        write_records(folder, read(name, format, images_root, rejected.append))
        lines = [dumps([r.where, r.reason]) + "\n" for r in rejected]
        (folder / "rejects.jsonl").write_text("".join(lines), "utf-8")

    if os.environ.get(NO_CACHE):
        folder = Path(mkdtemp(prefix="openm6-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        make(folder)
    else:
        folder = cached("source", key, make)
    lines = lines_of((folder / "rejects.jsonl").read_text("utf-8"))
    return StoredRecords(folder), tuple(Reject(where, reason) for where, reason in map(json.loads, lines))

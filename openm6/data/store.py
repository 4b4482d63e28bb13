"""Records on disk: a folder with a memory-mapped Arrow file, random access, written atomically.

A record is stored as JSON beside its byte strings, so records of one source may differ in their keys and types (typed
columns would refuse an answer that is 3 in one line and "three" in the next)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from openm6.core.environment import CACHE
from openm6.core.errors import DataError, UsageError, suggest
from openm6.core.files import loads, plain, publish

Record = dict[str, Any]
Made = TypeVar("Made")

HIDDEN = ("_where", "_root", "__key__")
"""Keys of a record's place, which are not columns."""

_BATCH_ROWS, _BATCH_BYTES = 1024, 8 * 2**20
_SCHEMA = pa.schema(
    [("json", pa.large_string()), ("keys", pa.list_(pa.string())), ("blobs", pa.list_(pa.large_binary()))]
)


def check_split(subject: str, split: str, splits: tuple[str, ...]) -> None:
    """Raises UsageError for an unknown split of generated data; `subject` begins the message, as "The logos have"."""
    if split not in splits:
        listed = f"{'They have' if subject.endswith('have') else 'It has'}: {', '.join(splits)}."
        raise UsageError(f"{subject} no split {split!r}.{suggest(split, splits)} {listed}")


class Records(Protocol):
    """Random access to records, and the names of the columns that occur in them."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class ListRecords:
    """Records in memory."""

    def __init__(self, records: Iterable[Mapping[str, Any]]):
        self._records = [dict(record) for record in records]
        self.columns = tuple(dict.fromkeys(key for record in self._records for key in record if key not in HIDDEN))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return dict(self._records[index])


class ArrowRecords:
    """The records of a folder written by `write_records`. Thread-safe."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.columns: tuple[str, ...] = tuple(json.loads((folder / "columns.json").read_text("utf-8")))
            reader = pa.ipc.open_file(pa.memory_map(str(folder / "records.arrow")))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, ValueError, TypeError):
            raise DataError(
                f"The cached records in {folder} are damaged: delete that folder and start again."
            ) from None
        self._ends = [0]
        for batch in self._batches:
            self._ends.append(self._ends[-1] + batch.num_rows)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        number, row = locate(self._ends, index)
        texts, keys, blobs = (column[row].as_py() for column in self._batches[number].columns)
        record: Record = loads(texts)
        record.update(zip(keys, blobs, strict=True))
        return record

    def blob(self, index: int) -> bytes:
        """The first byte string of a record, without the rest of it."""
        number, row = locate(self._ends, index)
        return self._batches[number].column(2)[row][0].as_py()


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """(part, row in it) of a record, where part n holds the records from `ends[n]` up to `ends[n + 1]`.

    Raises IndexError for a missing record; a negative index counts from the end."""
    if not -ends[-1] <= index < ends[-1]:
        raise IndexError(index)
    index %= ends[-1]
    part = bisect_right(ends, index) - 1
    return part, index - ends[part]


def write_records(folder: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records into a folder, in order; byte strings at the top level stay bytes. Returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, None] = {}
    total = 0
    with pa.OSFile(str(folder / "records.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        texts: list[str] = []
        keys: list[list[str]] = []
        blobs: list[list[bytes]] = []
        weight = 0
        for record in records:
            raw = {k: bytes(v) for k, v in record.items() if isinstance(v, (bytes, bytearray, memoryview))}
            text = json.dumps({k: v for k, v in record.items() if k not in raw}, ensure_ascii=False, default=plain)
            columns.update(dict.fromkeys(record))
            texts.append(text)
            keys.append(list(raw))
            blobs.append(list(raw.values()))
            weight += len(text) + sum(map(len, raw.values()))
            if len(texts) >= _BATCH_ROWS or weight >= _BATCH_BYTES:
                total += _flush(writer, texts, keys, blobs)
                weight = 0
        total += _flush(writer, texts, keys, blobs)
    shown = [name for name in columns if name not in HIDDEN]
    (folder / "columns.json").write_text(json.dumps(shown, ensure_ascii=False), "utf-8")
    return total


def _flush(writer: pa.RecordBatchWriter, *parts: list[Any]) -> int:
    count = len(parts[0])
    if count:
        arrays = [pa.array(part, field.type) for part, field in zip(parts, _SCHEMA, strict=True)]
        writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        for part in parts:
            part.clear()
    return count


def cache_folder() -> Path:
    """`$OPENM6_CACHE`, else `~/.cache/openm6`."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "openm6")


def shown(records: Iterable[Made], count: int, what: str) -> Iterable[Made]:
    """Show a progress bar on the terminal, for work that takes more than moments."""
    from rich.console import Console
    from rich.progress import track

    return track(records, what, total=count, console=Console(stderr=True), transient=True, disable=count < 2000)


def cached(name: str, key: object, make: Callable[[Path], object]) -> Path:
    """The cache folder for `key`, created by `make(folder)` when it does not exist.

    It is created atomically, and only once even when several processes request it at the same time."""
    from filelock import FileLock

    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
    place = cache_folder() / f"{name}-{digest}"
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"The cache folder {place.parent} cannot be made ({error.strerror}): set OPENM6_CACHE to another."
        ) from None
    with FileLock(f"{place}.lock"):
        if place.is_dir():  # another process created it in the meantime
            return place
        unfinished = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
        try:
            make(unfinished)
            publish(unfinished, place)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (28, 122):  # no space, over quota
                raise DataError(
                    f"The disk of {place.parent} is full: free space, or set OPENM6_CACHE to another folder."
                ) from None
            raise
    return place


def drawn(name: str, key: Mapping[str, Any], count: int, draw: Callable[[int], Record], what: str) -> ArrowRecords:
    """The records 0 to `count` - 1 generated by `draw`, in several threads, then from the cache."""

    def made() -> Iterator[Record]:
        with ThreadPoolExecutor() as pool:
            yield from shown(pool.map(draw, range(count)), count, what)

    return ArrowRecords(cached(name, key, lambda folder: write_records(folder, made())))


def iterate(records: Records) -> Iterator[Record]:
    """All records, in order."""
    return (records[i] for i in range(len(records)))

"""Records on disk: a folder with a memory-mapped file, random access, written atomically.

A record is stored as JSON beside its byte strings, so records of one source may differ in their keys and types (typed
columns would refuse an answer that is 3 in one line and "three" in the next)."""

import hashlib
import json
import mmap
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from openm6.core.environment import CACHE
from openm6.core.errors import DataError, UsageError, suggest
from openm6.core.files import dumps, loads, plain, publish

Record = dict[str, Any]
Made = TypeVar("Made")

HIDDEN = ("_where", "_root", "__key__")
"""Keys of a record's place, which are not columns."""

_FORMAT = 1  # of what `write_records` writes


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


class ComputedRecords:
    """`count` records, each computed at every access from its number."""

    def __init__(self, count: int, columns: Iterable[str], compute: Callable[[int], Record]):
        self._count, self.columns, self._compute = count, tuple(columns), compute

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        return self._compute(range(self._count)[index])


class StoredRecords:
    """The records of a folder written by `write_records`. Thread-safe."""

    def __init__(self, folder: Path):
        """Raises DataError for files that do not fit together."""
        self.folder = folder
        try:
            self.columns: tuple[str, ...] = tuple(json.loads((folder / "columns.json").read_text("utf-8")))
            self._ends = np.asarray(np.load(folder / "ends.npy", mmap_mode="r"))  # np.memmap slices ten times slower
            with open(folder / "records.bin", "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            is_whole = bool(size == self._ends[-1])
        except (OSError, EOFError, ValueError, TypeError, IndexError):
            is_whole = False
        if not is_whole:
            raise DataError(f"The cached records in {folder} are damaged: delete that folder and start again.")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        record, keys, blobs = self._read(index)
        record.update(zip(keys, blobs, strict=True))
        return record

    def blob(self, index: int) -> bytes:
        """The first byte string of a record."""
        return next(self._read(index)[2])

    def _read(self, index: int) -> tuple[Record, list[str], Iterator[bytes]]:
        """The JSON part of a record, the keys of its byte strings, and those."""
        number = range(len(self))[index]
        start, end = self._ends[number : number + 2].tolist()
        newline = self._bytes.find(b"\n", start, end)
        record, keys, sizes = loads(self._bytes[start:newline])
        ends = accumulate(sizes, initial=newline + 1)
        return record, keys, (self._bytes[a:b] for a, b in pairwise(ends))


def write_records(folder: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records into a folder, in order; byte strings at the top level stay bytes. Returns their number.

    records.bin has for each record a line of JSON ([the record without its byte strings, their keys, their lengths]),
    then the byte strings; ends.npy, int64 [records + 1], the end of each record, from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, None] = {}
    ends = array("q", [0])
    with open(folder / "records.bin", "wb") as file:
        for record in records:
            raw = {k: bytes(v) for k, v in record.items() if isinstance(v, (bytes, bytearray, memoryview))}
            rest = {k: v for k, v in record.items() if k not in raw}
            head = dumps([rest, list(raw), [len(v) for v in raw.values()]], plain) + "\n"
            columns.update(dict.fromkeys(record))
            file.writelines([head.encode(), *raw.values()])
            ends.append(file.tell())
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    shown = [name for name in columns if name not in HIDDEN]
    (folder / "columns.json").write_text(json.dumps(shown, ensure_ascii=False), "utf-8")
    return len(ends) - 1


def shown(records: Iterable[Made], count: int, what: str) -> Iterable[Made]:
    """The records, with a progress bar on the terminal while they are made, if they are many."""
    from rich.console import Console
    from rich.progress import track

    return track(records, what, total=count, console=Console(stderr=True), transient=True, disable=count < 2000)


def cached(name: str, key: object, make: Callable[[Path], object]) -> Path:
    """The folder for `key` in the cache (`$OPENM6_CACHE`, else `~/.cache/openm6`), created by `make(folder)` when it
    does not exist: atomically, and only once even when several processes request it at the same time."""
    from filelock import FileLock

    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True, default=str).encode()).hexdigest()[:20]
    place = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "openm6") / f"{name}-{digest}"
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


def iterate(records: Records) -> Iterator[Record]:
    """All records, in order."""
    return (records[i] for i in range(len(records)))

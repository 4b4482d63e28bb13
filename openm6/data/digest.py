"""The content of data as one hash: equal records and pictures give equal hashes, independently of file names.

All columns of the records count, in order. A picture named by a path counts by its name, its size and the first and
last 4 KiB of its file: an edited picture differs there, a copied or touched one does not, and a million pictures need
not be read whole. A picture behind a URL counts by its name alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from openm6.core.files import dumps, plain, write_json
from openm6.data.store import Record

END = 4096
"""Bytes at either end of a picture's file that count."""

KEPT = "content.json"
"""File with the hash of the records of a cache folder, beside them."""

_FILE_NAME = re.compile(r"[^\n]{1,250}\.[A-Za-z0-9]{2,5}")


def content_hash(records: Iterable[Record], folder: Path | None = None) -> str:
    """The hash of records, in hexadecimal. With `folder`, the cache that holds exactly these records, the hash of the
    records is computed once and stored there; pictures that they name are checked every time."""
    kept = _kept(folder)
    if kept and not kept["names_files"]:
        return str(kept["records"])
    own, files, names_files = hashlib.sha256(), hashlib.sha256(), False
    for record in records:
        if kept is None:
            _add(own, record)
        for name in _file_names(record):
            names_files = True
            files.update(_ends(Path(str(record.get("_root") or "")) / name))
    whole = kept["records"] if kept else own.hexdigest()
    if folder is not None and kept is None:
        with suppress(OSError):  # a read-only cache costs time only
            write_json(folder / KEPT, {"records": whole, "names_files": names_files})
    return hashlib.sha256(f"{whole} {files.hexdigest()}".encode()).hexdigest() if names_files else str(whole)


def json_hash(value: Any) -> str:
    """The hash of a JSON value, in hexadecimal."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def _kept(folder: Path | None) -> dict[str, Any] | None:
    try:
        return json.loads((folder / KEPT).read_text("utf-8")) if folder else None
    except (OSError, ValueError):
        return None


def _add(digest: Any, record: Record) -> None:
    """Add every column with its name, except keys that begin with _ (the place of a record)."""
    for name in sorted(name for name in record if not name.startswith("_")):
        value = record[name]
        if isinstance(value, bytes):
            digest.update(dumps([name, len(value)]).encode() + value)
        else:
            digest.update(dumps([name, value], plain).encode() + b"\n")
    digest.update(b"\n")


def _file_names(value: Any) -> Iterator[str]:
    """The texts in a record that could name a local file."""
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if not name.startswith("_")]
    if isinstance(value, list):
        for inner in value:
            yield from _file_names(inner)
    elif isinstance(value, str) and "://" not in value and _FILE_NAME.fullmatch(value):
        yield value


def _ends(path: Path) -> bytes:
    """Size, beginning and end of a file; b"" for a missing one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(END)
            file.seek(max(0, size - END))
            return b"%d " % size + first + file.read(END)
    except (OSError, ValueError):
        return b"-"

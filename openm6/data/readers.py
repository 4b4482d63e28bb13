"""From files in the usual formats to records.

A record is a dict of the columns that the file has, with `_where` (file:line or file#member) and `_root` (the
folder that its relative picture paths start from). A picture is a path, a URL or the bytes of a file; pictures are
not opened here.

A row that cannot be used goes to `on_reject`; a file that cannot be read at all raises DataError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openm6.data import annotated, bundled, tables
from openm6.data.files import expand, folder_of, is_folder, list_folder
from openm6.data.store import Record
from openm6.data.tables import OnReject
from openm6.errors import UsageError, suggest

Reader = Callable[[str, str | None, OnReject], Iterator[Record]]


def read(
    source: str | Path | Iterable[Mapping[str, Any]],
    format: str | None = None,
    images_root: str | None = None,
    on_reject: OnReject = lambda reject: None,
) -> Iterator[Record]:
    """All records of a path, URL, glob or list. The format is told by the name and content unless it is given.

    Raises UsageError for an unknown format, DataError for files that are missing or damaged.
    """
    if not isinstance(source, (str, Path)):
        yield from _read_list(source, images_root)
        return
    for path in expand(str(source)):
        reader = FORMATS[format_of(path, format)]
        for record in reader(path, images_root, on_reject):
            record.setdefault("_root", images_root or (path if is_folder(path) else folder_of(path)))
            yield record


def files_of(source: str) -> list[str]:
    """Every file that `read` would open (folders opened up): what a cache has to watch."""
    return [
        file for path in expand(source) for file in (list_folder(path) if is_folder(path) else [path, *_partners(path)])
    ]


def format_of(path: str, format: str | None = None) -> str:
    """The name of the format of a file or folder."""
    if format is not None:
        if format not in FORMATS:
            raise UsageError(
                f"There is no format {format!r}.{suggest(format, tuple(FORMATS))} Known: {', '.join(FORMATS)}."
            )
        return format
    if is_folder(path):
        names = [n.lower() for n in list_folder(path)]
        if any(n.endswith("_texts.jsonl") for n in names) and any(n.endswith("_imgs.tsv") for n in names):
            return "muge"
        for ending, name in ((".parquet", "parquet"), (".tar", "webdataset")):
            if any(n.endswith(ending) for n in names):
                return name
        return "folder"
    name = path.lower().removesuffix(".gz")
    if annotated.muge_images(path):
        return "muge"
    for ending, found in _ENDINGS.items():
        if name.endswith(ending):
            return _json_format(path) if found == "json" else found
    known = ", ".join(_ENDINGS)
    raise UsageError(f"The format of {path} cannot be told from its name ({known} are known): name it by `format`.")


def _json_format(path: str) -> str:
    """Which of the JSON layouts a file has, by the keys at its top."""
    content = tables.load_json(path)
    if isinstance(content, dict):
        if "questions" in content:
            return "vqa"
        if "images" in content and "annotations" in content:
            return "coco"
    return "json"


def _read_list(rows: Iterable[Mapping[str, Any]], images_root: str | None) -> Iterator[Record]:
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UsageError(
                f"Record {number} of the list is a {type(row).__name__}; "
                "write dicts such as {'image': ..., 'text': ...}."
            )
        record = {key: bundled.plain_picture(value) for key, value in row.items()}
        record.setdefault("_where", f"record {number}")
        record.setdefault("_root", images_root or "")
        yield record


def _partners(path: str) -> list[str]:
    """Files that are read along with this one."""
    if other := annotated.muge_images(path):
        return [other]
    return [other] if (other := annotated.vqa_annotations(path)) else []


FORMATS: dict[str, Reader] = {
    "jsonl": tables.read_jsonl,
    "json": tables.read_json,
    "csv": tables.read_csv,
    "tsv": tables.read_tsv,
    "coco": annotated.read_coco,
    "vqa": annotated.read_vqa,
    "muge": annotated.read_muge,
    "parquet": bundled.read_parquet,
    "webdataset": bundled.read_tar,
    "folder": bundled.read_folder,
}
_ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".tar": "webdataset",
}  # fmt: skip

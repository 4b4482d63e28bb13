"""Readers: records from files in the usual formats.

A record is a dict of the columns of the file, with `_where` (file:line or file#member) and `_root` (the folder from
which its relative picture paths start). A picture is a path, a URL or the bytes of a file; readers do not open
pictures.

A row that cannot be used goes to `on_reject`; a file that cannot be read at all raises DataError."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from openm6.core.errors import DataError, UsageError, suggest
from openm6.data import annotated, bundled, sheets, tables
from openm6.data.bundled import plain_picture
from openm6.data.files import absolute, expand, folder_of, is_folder, list_folder
from openm6.data.rejects import OnReject
from openm6.data.store import HIDDEN, Record

Reader = Callable[..., Iterator[Record]]
"""(path, images_root, on_reject, **options of `_OPTIONS`)"""


def read(
    source: str | Path | Iterable[Mapping[str, Any]],
    format: str | None = None,
    images_root: str | None = None,
    on_reject: OnReject = lambda reject: None,
) -> Iterator[Record]:
    """All records of a path, URL, glob or list. The format is detected from name and content unless it is given.

    A format may have options: `csv?encoding=gb18030&names=image,text`, or `?encoding=gb18030` for the detected format.
    Raises UsageError for an unknown format, DataError for files that are missing or damaged."""
    if not isinstance(source, (str, Path)):
        yield from _read_list(source, images_root)
        return
    for path in expand(str(source)):
        kind = format_of(path, format)
        root = absolute(images_root or (path if is_folder(path) else folder_of(path)))
        for row in FORMATS[kind](path, images_root, on_reject, **_options(kind, format)):
            record = {key: value if key in HIDDEN else plain_picture(value) for key, value in row.items()}
            record.setdefault("_root", root)
            yield record


def with_options(format: str | None, encoding: str | None = None, names: str | None = None) -> str | None:
    """A format with its options, as `read` takes it."""
    options = {key: value for key, value in (("encoding", encoding), ("names", names)) if value}
    return f"{format or ''}?{urlencode(options)}" if options else format


def _options(kind: str, format: str | None) -> dict[str, Any]:
    """The options in `format` for a reader of this kind."""
    options: dict[str, Any] = dict(parse_qsl((format or "").partition("?")[2], keep_blank_values=True))
    known = _OPTIONS.get(kind, ())
    if unknown := ", ".join(options.keys() - set(known)):
        raise UsageError(f"The format {kind} has no option {unknown}; it has: {', '.join(known) or 'none'}.")
    if "names" in options:
        options["names"] = [name.strip() for name in options["names"].split(",")]
        if "" in options["names"] or len(set(options["names"])) < len(options["names"]):
            raise UsageError("names has to list the columns, each once: id,image,text.")
    return options


def files_of(source: str) -> list[str]:
    """Every file that `read` would open (folders expanded): the dependencies of a cache."""
    return [
        file for path in expand(source) for file in (list_folder(path) if is_folder(path) else [path, *_partners(path)])
    ]


def format_of(path: str, format: str | None = None) -> str:
    """The name of the format of a file or folder."""
    options = (format or "").partition("?")[2]
    if format := (format or "").partition("?")[0]:
        if format not in FORMATS:
            raise UsageError(
                f"There is no format {format!r}.{suggest(format, tuple(FORMATS))} Known: {', '.join(FORMATS)}."
            )
        return format
    if is_folder(path):
        files = list_folder(path)
        names = [n.lower() for n in files]
        if any(annotated.muge_images(name) for name in files):
            return "muge"
        for endings, name in (((".parquet",), "parquet"), ((".tar", ".tar.gz"), "webdataset")):
            if any(n.endswith(endings) for n in names):
                return name
        return "folder"
    name = path.lower().removesuffix(".gz")
    if annotated.muge_images(path):
        return "muge"
    for ending, found in _ENDINGS.items():
        if name.endswith(ending):
            return _json_format(path, dict(parse_qsl(options)).get("encoding")) if found == "json" else found
    known = ", ".join(_ENDINGS)
    raise UsageError(f"The format of {path} cannot be told from its name ({known} are known): name it by `format`.")


def _json_format(path: str, encoding: str | None) -> str:
    """The JSON layout of a file, by its top-level keys; JSON lines where it is not JSON as a whole and lines of it are
    objects."""
    try:
        content = tables.load_json(path, encoding)
    except DataError:
        with suppress(DataError):
            if next(tables.read_jsonl(path, None, lambda reject: None, encoding), None) is not None:
                return "jsonl"
        raise
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
        record = {key: plain_picture(value) for key, value in row.items()}
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
    "txt": tables.read_lines,
    "xlsx": sheets.read_xlsx,
    "coco": annotated.read_coco,
    "vqa": annotated.read_vqa,
    "muge": annotated.read_muge,
    "ofa": annotated.read_ofa,
    "parquet": bundled.read_parquet,
    "webdataset": bundled.read_tar,
    "folder": bundled.read_folder,
}
_OPTIONS: dict[str, tuple[str, ...]] = {
    "csv": ("encoding", "names"), "tsv": ("encoding", "names"), "jsonl": ("encoding",), "json": ("encoding",),
    "txt": ("encoding",),
}  # fmt: skip
_ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".tar": "webdataset", ".txt": "txt", ".xlsx": "xlsx",
}  # fmt: skip

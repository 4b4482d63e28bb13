"""Records from text files: JSON lines, JSON lists, CSV and TSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from openm6.data.files import open_file, read_file
from openm6.data.rejects import Reject
from openm6.data.store import Record
from openm6.errors import DataError

OnReject = Callable[[Reject], None]


def load_json(path: str) -> Any:
    try:
        return json.loads(read_file(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not valid JSON ({error.msg}).") from None


def read_jsonl(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """One JSON object a line."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                on_reject(Reject(where, f"{where} is not UTF-8 text."))
                continue
            except json.JSONDecodeError as error:
                on_reject(Reject(where, f"{where} is not valid JSON ({error.msg} at column {error.colno})."))
                continue
            if isinstance(row, dict):
                yield {**row, "_where": where}
            else:
                on_reject(Reject(where, f"{where} is no JSON object: a line has to be {{...}}."))


def read_json(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """A JSON list of objects."""
    content = load_json(path)
    if not isinstance(content, list):
        raise DataError(
            f"{path} has to hold a list of objects, or COCO captions, or VQA questions; it holds none of them."
        )
    for number, row in enumerate(content):
        where = f"{path}#{number}"
        if isinstance(row, dict):
            yield {**row, "_where": where}
        else:
            on_reject(Reject(where, f"{where} is no JSON object."))


def read_csv(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """Comma-separated, quoted by \", the first line names the columns."""
    yield from _rows(path, on_reject, delimiter=",")


def read_tsv(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
    """Tab-separated, nothing quoted, the first line names the columns."""
    yield from _rows(path, on_reject, delimiter="\t", quoting=csv.QUOTE_NONE)


def _rows(path: str, on_reject: OnReject, **dialect: Any) -> Iterator[Record]:
    csv.field_size_limit(2**27)  # a picture in base64 is one field
    with open_file(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        lines = csv.reader(text, **dialect)
        try:
            header = next(lines, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise DataError(
                    f"{path}:1 names a column twice; the first line has to name the columns ({', '.join(header)})."
                )
            for cells in lines:
                where = f"{path}:{lines.line_num}"
                if not cells:
                    continue
                if len(cells) == len(header):
                    yield {**dict(zip(header, cells, strict=True)), "_where": where}
                    continue
                missing = f" (missing: {', '.join(header[len(cells) :])})" if len(cells) < len(header) else ""
                on_reject(
                    Reject(where, f"{where} has {len(cells)} fields where the first line names {len(header)}{missing}.")
                )
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num} cannot be read as a table ({error}).") from None

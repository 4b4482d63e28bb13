"""Records from text files: JSON lines, JSON lists, CSV, TSV, and one text a line."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from openm6.core.errors import DataError, cut
from openm6.core.files import fault_of, parse
from openm6.core.images import held_picture
from openm6.data.rejects import OnReject, Reject
from openm6.data.store import Record
from openm6.data.text import is_text, numbered_lines, read_text


def load_json(path: str, encoding: str | None = None) -> Any:
    """The value of a JSON file, perhaps with faults that `files.fault_of` finds.

    Raises DataError for invalid JSON."""
    try:
        return parse(read_text(path, encoding))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not valid JSON ({error.msg}).") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: it {error}.") from None


def read_jsonl(
    path: str, images_root: str | None, on_reject: OnReject, encoding: str | None = None
) -> Iterator[Record]:
    """One JSON object a line."""
    for number, line in numbered_lines(path, on_reject, encoding):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        if not is_text(line):
            on_reject(Reject(where, f"{where} is not {encoding or 'UTF-8'} text."))
            continue
        try:
            row = parse(line)
        except json.JSONDecodeError as error:
            on_reject(Reject(where, f"{where} is not valid JSON ({error.msg} at column {error.colno})."))
        except ValueError as error:
            on_reject(Reject(where, f"{where} {error}."))
        else:
            yield from _object(row, where, "a line has to be {...}", on_reject)


def read_lines(
    path: str, images_root: str | None, on_reject: OnReject, encoding: str | None = None
) -> Iterator[Record]:
    """One text a line, in the column `text`."""
    for number, line in numbered_lines(path, on_reject, encoding):
        where = f"{path}:{number}"
        if not is_text(line):
            on_reject(Reject(where, f"{where} is not {encoding or 'UTF-8'} text."))
        elif text := line.strip():
            yield {"text": text, "_where": where}


def read_json(path: str, images_root: str | None, on_reject: OnReject, encoding: str | None = None) -> Iterator[Record]:
    """A JSON list of objects."""
    content = load_json(path, encoding)
    if not isinstance(content, list):
        raise DataError(
            f"{path} has to hold a list of objects, or COCO captions, or VQA questions; it holds none of them."
        )
    for number, row in enumerate(content):
        yield from _object(row, f"{path}#{number}", "an element has to be {...}", on_reject)


def _object(row: Any, where: str, rule: str, on_reject: OnReject) -> Iterator[Record]:
    if fault := fault_of(row):
        on_reject(Reject(where, f"{where} {fault}."))
    elif isinstance(row, dict):
        yield {**row, "_where": where}
    else:
        on_reject(Reject(where, f"{where} is no JSON object: {rule}."))


def read_csv(
    path: str,
    images_root: str | None,
    on_reject: OnReject,
    encoding: str | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Record]:
    """The rows of a CSV, quoted by "; the first line names the columns unless `names` does.

    Separated by commas, or by semicolons, bars or tabs where the first lines are unambiguous. `_where` is the first
    line of a row."""
    lines = numbered_lines(path, on_reject, encoding)
    head = list(islice(lines, 21))
    yield from _rows(path, chain(head, lines), on_reject, names, delimiter=_separator([line for _, line in head]))


def read_tsv(
    path: str,
    images_root: str | None,
    on_reject: OnReject,
    encoding: str | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Record]:
    """The rows of a tab-separated table without quoting; the first line names the columns unless `names` does."""
    lines = numbered_lines(path, on_reject, encoding)
    yield from _rows(path, lines, on_reject, names, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separator(head: list[str]) -> str:
    """The separator of a CSV, by its first lines: the comma unless another one alone fits."""

    def fits(separator: str) -> bool:
        rows = [row for row in csv.reader(head, delimiter=separator) if row]
        if len(head) > 20:  # the last row may continue
            rows.pop()
        return len(rows) > 0 and len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows)

    fitting = [separator for separator in ",;|\t" if fits(separator)]
    if not fitting and head and "," not in head[0]:
        fitting = [separator for separator in ";|\t" if separator in head[0]]
    return fitting[0] if "," in fitting or len(fitting) == 1 else ","


def _rows(
    path: str, lines: Iterable[tuple[int, str]], on_reject: OnReject, names: Sequence[str] | None, **dialect: Any
) -> Iterator[Record]:
    csv.field_size_limit(2**27)  # a picture in base64 is one field
    header = names
    for number, cells, whole in _cells(lines, **dialect):
        where = f"{path}:{number}"
        fault = ""
        if cells is None:
            fault = "opens a quote that no later quote closes rightly: close it, and double quotes inside of a cell"
        elif not whole:
            fault = "is not text in the encoding of the file, or holds a NUL byte"
        elif header is None:
            header = _header(path, cells)
            continue
        elif not cells:
            continue
        elif len(cells) != len(header):
            missing = f" (missing: {', '.join(map(cut, header[len(cells) :]))})" if len(cells) < len(header) else ""
            fault = f"has {len(cells)} fields where the first line names {len(header)}{missing}"
        if not fault:
            yield {**dict(zip(header or (), cells or (), strict=True)), "_where": where}
        elif header is None:
            raise DataError(f"{where} has to name the columns, and {fault}.")
        else:
            on_reject(Reject(where, f"{where} {fault}."))


def _header(path: str, cells: list[str]) -> list[str]:
    if found := next((c for c in cells if len(c) > 200 or (c.isdigit() and len(c) > 4) or held_picture(c)), None):
        names = ",".join(f"column{number}" for number in range(1, len(cells) + 1))
        raise DataError(
            f"{path}:1 holds data ({cut(found)}) where the names of the {len(cells)} columns should stand: "
            f"name them by --names {names} (in a recipe, format: '?names={names}'); for a file of OFA, --format ofa."
        )
    if len(set(cells)) < len(cells):
        raise DataError(
            f"{path}:1 names a column twice; the first line has to name the columns ({', '.join(map(cut, cells))})."
        )
    return cells


def _cells(lines: Iterable[tuple[int, str]], **dialect: Any) -> Iterator[tuple[int, list[str] | None, bool]]:
    """(first line, cells, whether all of it is text) of each row; no cells where a quote is not closed as CSV requires.

    The lines after the first one are then read again as rows of their own, so that an open quote costs one line."""
    again: deque[tuple[int, str]] = deque()
    rest = iter(lines)
    taken: list[tuple[int, str]] = []

    def feed() -> Iterator[str]:
        while line := again.popleft() if again else next(rest, None):
            taken.append(line)
            yield line[1]

    rows = csv.reader(feed(), strict=True, **dialect)
    while True:
        taken.clear()
        try:
            cells = next(rows, None)
        except csv.Error:
            again.extendleft(reversed(taken[1:]))
            rows = csv.reader(feed(), strict=True, **dialect)
            yield taken[0][0], None, True
            continue
        if cells is None:
            return
        yield taken[0][0], cells, all(is_text(line) and "\0" not in line for _, line in taken)

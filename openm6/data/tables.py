"""Records from JSON lines, JSON lists, CSV, TSV, files of one text a line, and Excel workbooks."""

import csv
import datetime
import io
import json
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from openm6.core.errors import DataError, cut
from openm6.core.files import fault_of, parse
from openm6.core.images import held_picture
from openm6.data.files import is_text, numbered_lines, read_file, read_text
from openm6.data.rejects import OnReject, Reject
from openm6.data.store import Record


def load_json(path: str, encoding: str | None = None) -> Any:
    """The value of a JSON file, perhaps with faults that `files.fault_of` finds.
    Raises DataError for invalid JSON."""
    try:
        return parse(read_text(path, encoding))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not valid JSON ({error.msg}).") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: it {error}.") from None


def read_jsonl(path: str, on_reject: OnReject, encoding: str | None = None) -> Iterator[Record]:
    """One JSON object a line."""
    for where, line in _text_lines(path, on_reject, encoding):
        try:
            row = parse(line)
        except json.JSONDecodeError as error:
            on_reject(Reject(where, f"{where} is not valid JSON ({error.msg} at column {error.colno})."))
        except ValueError as error:
            on_reject(Reject(where, f"{where} {error}."))
        else:
            yield from _object(row, where, "a line has to be {...}", on_reject)


def read_lines(path: str, on_reject: OnReject, encoding: str | None = None) -> Iterator[Record]:
    """One text a line, in the column `text`."""
    return ({"text": line.strip(), "_where": where} for where, line in _text_lines(path, on_reject, encoding))


def _text_lines(path: str, on_reject: OnReject, encoding: str | None) -> Iterator[tuple[str, str]]:
    """Place and content of each line that is neither blank nor invalid in its encoding."""
    for number, line in numbered_lines(path, on_reject, encoding):
        where = f"{path}:{number}"
        if not is_text(line):
            on_reject(Reject(where, f"{where} is not {encoding or 'UTF-8'} text."))
        elif line.strip():
            yield where, line


def read_json(path: str, on_reject: OnReject, encoding: str | None = None) -> Iterator[Record]:
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
    path: str, on_reject: OnReject, encoding: str | None = None, names: Sequence[str] | None = None
) -> Iterator[Record]:
    """The rows of a CSV, quoted by "; the first line names the columns unless `names` does.

    Separated by commas, or by semicolons, bars or tabs where the first lines are unambiguous. `_where` is the first
    line of a row."""
    lines = numbered_lines(path, on_reject, encoding)
    head = list(islice(lines, 21))
    yield from _rows(path, chain(head, lines), on_reject, names, delimiter=_separator([line for _, line in head]))


def read_tsv(
    path: str, on_reject: OnReject, encoding: str | None = None, names: Sequence[str] | None = None
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


MAX_UNPACKED = 512 * 2**20
"""Maximum size of a workbook after decompression, in bytes: a small file can hold gigabytes of zeros."""


def read_xlsx(path: str, on_reject: OnReject) -> Iterator[Record]:
    """The rows of the one sheet that has any; its first row names the columns.

    Whole numbers are int, others float, dates ISO text, formulas their values when the file was saved; an empty cell is
    None. A row with an error (#N/A) is rejected. Raises DataError for an invalid workbook or several sheets with rows.
    """
    import openpyxl

    try:
        content = io.BytesIO(read_file(path))
        with zipfile.ZipFile(content) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_UNPACKED:
            raise DataError(f"{path} has {size / 2**20:.0f} MiB unpacked; at most {MAX_UNPACKED / 2**20:.0f} are read.")
        book = openpyxl.load_workbook(content, read_only=True, data_only=True)
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # the declared size can be less than the real one
        sheets = [s for s in book.worksheets if any(_filled(row) for row in s.iter_rows(max_row=9))]
        if len(sheets) > 1:
            raise DataError(
                f"{path} has several sheets with rows ({', '.join(cut(s.title) for s in sheets)}): keep one in a file."
            )
        formulas = openpyxl.load_workbook(content, read_only=True)
        for sheet in sheets:
            formulas[sheet.title].reset_dimensions()
            yield from _sheet_rows(path, sheet, formulas[sheet.title], on_reject)
    except DataError:
        raise
    except Exception as error:  # openpyxl raises any exception at damaged files
        raise DataError(f"{path} is no Excel workbook, or is damaged ({type(error).__name__}).") from None


def _filled(row: Any) -> bool:
    return any(cell.value is not None for cell in row)


def _sheet_rows(path: str, sheet: Any, formulas: Any, on_reject: OnReject) -> Iterator[Record]:
    header: list[str] | None = None
    for number, (row, written) in enumerate(zip(sheet.iter_rows(), formulas.iter_rows(), strict=True), 1):
        where = f"{path}:{number}"
        if not _filled(written):
            continue
        values = [_json_value(cell.value) for cell in row]
        if header is None:
            header = ["" if value is None else str(value) for value in values]
            while header and not header[-1]:
                header.pop()
            if len(set(header)) < len(header) or "" in header:
                raise DataError(
                    f"{where} has to name every column once; it has: {', '.join(cut(name) for name in header)}."
                )
        elif error := next((cell.value for cell in row if cell.data_type == "e"), None):
            on_reject(Reject(where, f"{where} has a cell with the error {error}."))
        elif any(a.value is None and b.data_type == "f" for a, b in zip(row, written, strict=True)):
            on_reject(Reject(where, f"{where} has a formula without a value: open the file in Excel and save it."))
        elif any(value is not None for value in values[len(header) :]):
            on_reject(Reject(where, f"{where} has a cell beyond the {len(header)} columns that the first row names."))
        else:
            values += [None] * (len(header) - len(values))
            yield {**dict(zip(header, values, strict=False)), "_where": where}


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else value

"""Records from Excel workbooks."""

from __future__ import annotations

import datetime
import io
import zipfile
from collections.abc import Iterator
from typing import Any

from openm6.core.errors import DataError, cut
from openm6.data.files import read_file
from openm6.data.rejects import OnReject, Reject
from openm6.data.store import Record

MAX_UNPACKED = 512 * 2**20
"""Maximum size of a workbook after decompression, in bytes: a small file can hold gigabytes of zeros."""


def read_xlsx(path: str, images_root: str | None, on_reject: OnReject) -> Iterator[Record]:
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
            yield from _rows(path, sheet, formulas[sheet.title], on_reject)
    except DataError:
        raise
    except Exception as error:  # openpyxl raises any exception at damaged files
        raise DataError(f"{path} is no Excel workbook, or is damaged ({type(error).__name__}).") from None


def _filled(row: Any) -> bool:
    return any(cell.value is not None for cell in row)


def _rows(path: str, sheet: Any, formulas: Any, on_reject: OnReject) -> Iterator[Record]:
    header: list[str] | None = None
    for number, (row, written) in enumerate(zip(sheet.iter_rows(), formulas.iter_rows(), strict=True), 1):
        where = f"{path}:{number}"
        if not _filled(written):
            continue
        values = [_plain(cell.value) for cell in row]
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


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else value

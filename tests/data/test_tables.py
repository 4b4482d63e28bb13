import datetime
import io
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from openm6.core.errors import DataError
from openm6.data.rejects import Reject
from openm6.data.store import Record
from openm6.data.tables import MAX_UNPACKED, read_xlsx


def load(path: Path) -> tuple[list[Record], list[Reject]]:
    rejected: list[Reject] = []
    return list(read_xlsx(str(path), rejected.append)), rejected


def workbook(path: Path, *sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"表{number}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_the_rows_of_a_sheet_with_their_values_as_they_are_shown(tmp_path: Path) -> None:
    rows = [
        ["评论", "价格", "数量", "日期"], ["好", 99.5, 3.0, datetime.datetime(2024, 5, 6)], [],
        ["差", 1, None, datetime.datetime(2024, 5, 6, 7, 8)],
    ]  # fmt: skip
    path = workbook(tmp_path / "a.xlsx", rows, [])
    records, rejected = load(path)
    assert rejected == []
    assert records == [
        {"评论": "好", "价格": 99.5, "数量": 3, "日期": "2024-05-06", "_where": f"{path}:2"},
        {"评论": "差", "价格": 1, "数量": None, "日期": "2024-05-06T07:08:00", "_where": f"{path}:4"},
    ]
    assert [type(r["数量"]) for r in records] == [int, type(None)]


def test_errors_in_cells_and_cells_beyond_the_columns_are_rejected(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [["a", "b"], ["#N/A", 1], ["x", 2, 3], ["y", 3]])
    records, rejected = load(path)
    assert [r["a"] for r in records] == ["y"]
    assert [r.where for r in rejected] == [f"{path}:2", f"{path}:3"]
    assert "#N/A" in rejected[0].reason


def test_a_formula_that_was_never_computed_is_rejected(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [["a", "b"], ["x", "=1+1"], ["y", 3]])
    records, rejected = load(path)
    assert [r["a"] for r in records] == ["y"]
    assert rejected[0].reason == f"{path}:2 has a formula without a value: open the file in Excel and save it."


def test_rows_beyond_the_size_that_a_file_states_are_read(tmp_path: Path) -> None:
    path = workbook(tmp_path / "a.xlsx", [["a"], *([n] for n in range(20))])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    assert b'ref="A1:A21"' in members[sheet]
    members[sheet] = members[sheet].replace(b'ref="A1:A21"', b'ref="A1:A2"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert [r["a"] for r in load(path)[0]] == list(range(20))


@pytest.mark.parametrize("header", [["a", "a"], ["a", None, "b"]])
def test_a_header_that_does_not_name_every_column_once(tmp_path: Path, header: list[str]) -> None:
    with pytest.raises(DataError, match=r":1 has to name every column once"):
        load(workbook(tmp_path / "a.xlsx", [header, [1, 2, 3]]))


def test_several_sheets_with_rows_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="several sheets with rows .表0, 表1."):
        load(workbook(tmp_path / "a.xlsx", [["a"], [1]], [["a"], [2]]))


@pytest.mark.slow
def test_what_is_no_workbook_and_what_unpacks_to_too_much(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK no workbook")
    with pytest.raises(DataError, match="no Excel workbook"):
        load(tmp_path / "a.xlsx")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("xl/sheet.xml", "w") as file:
        for _ in range(MAX_UNPACKED // 2**24 + 1):
            file.write(bytes(2**24))
    (tmp_path / "a.xlsx").write_bytes(packed.getvalue())
    with pytest.raises(DataError, match="MiB unpacked; at most 512"):
        load(tmp_path / "a.xlsx")

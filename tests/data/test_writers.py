"""What is written as CSV, JSON lines or Parquet is read as it was."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import UsageError
from openm6.data.readers import read
from openm6.data.source import open_source
from openm6.data.writers import writer_for

texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)
mixed = st.one_of(
    st.none(), texts, st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(-1, 1), max_size=3), st.dictionaries(texts, st.integers(0, 9), max_size=2),
    st.binary(max_size=4),
)  # fmt: skip


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    writer_for(path)(path, ["a", "b"], lambda: iter(rows))
    return path


@given(rows=st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), min_size=1, max_size=6))
def test_texts_come_back_from_every_format(
    rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    for ending in ("csv", "jsonl", "parquet"):
        found = read(written(folder / f"t.{ending}", rows))
        assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in found] == rows


@given(values=st.lists(mixed, min_size=1, max_size=6))
def test_parquet_holds_values_of_any_types_in_one_column(
    values: list, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("w") / "t.parquet", [{"a": v, "b": "x"} for v in values])
    assert pq.read_table(path).num_rows == len(values)


def test_a_type_that_only_shows_later_changes_no_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("openm6.data.writers._ROWS", 2)
    path = tmp_path / "t.parquet"
    found = pq.read_table(written(path, [{"a": a, "b": b} for a, b in ((1, 1), (2, 2), (2.5, "x"), (None, 4))]))
    assert found["a"].to_pylist() == [1, 2, 2.5, None] and found["b"].to_pylist() == ["1", "2", "x", "4"]
    found = pq.read_table(written(path, [{"a": a} for a in (2**60 + 1, 3, 0.5)]))
    assert found["a"].to_pylist() == [str(2**60 + 1), "3", "0.5"]


def test_a_csv_opens_in_excel_and_tells_values_in_words(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", [{"a": '红,\r\n"裙"', "b": [0.5, 1]}, {"a": b"\x00\xff", "b": True}, {"b": 3}])
    assert path.read_bytes().startswith(b"\xef\xbb\xbfa,b\r\n")
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [['红,\r\n"裙"', "[0.5, 1]"], [base64.b64encode(b"\x00\xff").decode(), "true"], ["", "3"]]
    assert len(open_source(path)) == 3


def test_other_endings_and_vectors_in_a_csv_are_refused() -> None:
    with pytest.raises(UsageError, match=r"out.xlsx ends in .xlsx: answers are written as .csv, .jsonl, .parquet"):
        writer_for(Path("out.xlsx"))
    with pytest.raises(UsageError, match="name the output out.parquet or out.jsonl"):
        writer_for(Path("out.CSV"), holds_vectors=True)

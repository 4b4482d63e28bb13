"""Types of an index's columns: told by all values, never a changed value, mistakes in words about the index."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from openm6.core.errors import DataError, UsageError
from openm6.retrieve import Index
from openm6.retrieve.columns import convert, types_of


def typed(*values: Any, cells: bool = False) -> str:
    return types_of([{"x": value} for value in values], ["x"], cells)["x"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((1, 2, None), "int64"), ((1, 99.5), "float64"), ((1.0, 2.0), "float64"), ((True, None), "bool"),
        (("a", "7"), "string"), (("7", "8"), "string"), ((2**53 + 1, 1), "int64"),
    ],
)  # fmt: skip
def test_values_say_the_type_of_a_column(values: tuple[Any, ...], kind: str) -> None:
    assert typed(*values) == kind


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (("10", "20", ""), "int64"), (("10", "99.5"), "float64"), (("-1", "1e-05"), "float64"),
        (("true", "False"), "bool"), (("10", "007"), "string"), (("10", "cheap"), "string"), (("", ""), "string"),
        (("1E5", "2E7"), "string"), (("1,000", "2"), "string"), ((str(2**70), "1"), "string"), (("９", "1"), "string"),
    ],
)  # fmt: skip
def test_cells_of_a_csv_say_the_type_of_a_column(cells: tuple[str, ...], kind: str) -> None:
    assert typed(*cells, cells=True) == kind


@pytest.mark.parametrize("values", [("cheap", 9), (True, 1), (2**53 + 1, 0.5), (2**70,), (["a"],), ({"a": 1}, None)])
def test_values_without_a_common_type_are_refused_with_the_record(values: tuple[Any, ...]) -> None:
    records = [{"x": value, "_where": f"goods.jsonl:{line}"} for line, value in enumerate(values, 1)]
    with pytest.raises(UsageError, match=r"column x has values of no common type.*goods.jsonl:\d.*--keep x:text"):
        types_of(records, ["x"], False)
    with pytest.raises(UsageError, match="column x is empty"):
        typed(None, None)


@given(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.decimals(allow_nan=False).map(str),
    st.sampled_from(["string", "int64", "float64", "bool"]),
)
@example(99.5, "int64")
@example(2**60 + 1, "float64")
@example("0.1", "float64")
def test_a_value_is_stored_exactly_or_refused(value: Any, kind: str) -> None:
    try:
        stored = convert(value, kind)
    except ValueError:
        return
    assert stored == value or str(stored) == str(value) or float(stored) == float(value)
    assert isinstance(value, bool) == isinstance(stored, bool)
    if isinstance(value, int):
        assert int(stored) == value


@pytest.mark.slow
def test_numpy_values_and_dates_are_stored_too(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", 2, {"price": "float", "stock": "int", "day": "text", "new": "bool"})
    values = {"price": np.array([99.5, 3]), "stock": np.arange(2), "day": [date(2026, 1, 2), "2026-02-01"]}
    index.add([7, "8"], np.eye(2), {**values, "new": np.array([True, False])})  # type: ignore[list-item]
    found = index.search(np.ones(2), where="day < '2026-02-01' AND new", columns=["price", "stock", "day"])[0]
    assert [(hit.id, hit.columns) for hit in found] == [("7", {"price": 99.5, "stock": 0, "day": "2026-01-02"})]


@pytest.mark.slow
def test_a_value_that_would_change_is_an_error_that_names_the_item(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", 2, {"price": "int"})
    index.add(["a"], np.ones((1, 2)), {"price": [99.0]})
    with pytest.raises(DataError, match=r"The item b: price is 99\.5, .* has the type int"):
        index.add(["a", "b"], np.ones((2, 2)), {"price": [1, 99.5]})
    with pytest.raises(DataError, match="price has 1 values for 2 ids"):
        index.add(["a", "b"], np.ones((2, 2)), {"price": [1]})
    for name in (7.0, None, True, ["a"], ""):
        with pytest.raises(DataError, match="Item 0: the id is .*an id is a text or a whole number"):
            index.add([name], np.ones((1, 2)), {"price": [1]})  # type: ignore[list-item]
    with pytest.raises(DataError, match="id 7 is given twice"):
        index.add([7, "7"], np.ones((2, 2)), {"price": [1, 2]})  # type: ignore[list-item]
    hits = index.search(np.ones(2), columns=["price"])[0]
    assert [(hit.id, hit.columns) for hit in hits] == [("a", {"price": 99})]


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("price < '100'", "a column of the type float is compared with '100', which is of the type text"),
        ("stock < 1.5", "a column of the type int is compared with 1.5, which is of the type float"),
        ("colour = 1", "a column of the type text is compared with 1, which is of the type int"),
        ("new = 1", "a column of the type bool is compared with 1"),
        ("prise < 100", 'there is no column \'prise\'. Did you mean "price"? Columns: id text, price float'),
        ('colour = "红"', "there is no column '红'. A text stands in single quotes: '红'"),
        ("price <", "it is not an SQL condition"), ("price", "it is not a condition that is true or false"),
        ("far(price)", "there is no function 'far'"), ("stock / 0 = 1", "it fails on the items"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_filter_is_told_with_the_columns_and_their_types(tmp_path: Path, where: str, told: str) -> None:
    columns = {"price": "float", "stock": "int", "colour": "text", "new": "bool"}
    index = Index.create(tmp_path / "index", 2, columns)
    index.add(["a"], np.ones((1, 2)), {"price": [1], "stock": [1], "colour": ["红"], "new": [True]})
    for ask in (lambda: index.search(np.ones(2), where=where), lambda: index.delete(where=where)):
        with pytest.raises(UsageError) as caught:
            ask()
        message = str(caught.value)
        assert told in message and "price float, stock int, colour text, new bool" in message
        assert not any(word in message for word in ("Utf8", "Int64", "Float64", "lance", ".rs"))


def test_types_have_the_names_that_people_use(tmp_path: Path) -> None:
    Index.create(tmp_path / "index", 2, {"price": "float", "stock": "int64"})
    assert json.loads((tmp_path / "index" / "index.json").read_text("utf-8"))["columns"] == {
        "price": "float64", "stock": "int64",
    }  # fmt: skip
    with pytest.raises(UsageError, match="cannot have the type 'flaot'. Did you mean \"float\"?"):
        Index.create(tmp_path / "other", 2, {"price": "flaot"})

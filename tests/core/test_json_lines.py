"""A value stays on its line, whatever its texts hold."""

from __future__ import annotations

import json
from datetime import date

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from openm6.core.files import dumps, lines_of, loads, plain

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@given(st.lists(VALUES, min_size=1))
@example(["\u2028", {"a\x85": "\u2029\x0b\x1c"}, "\r\n"])
def test_values_come_back_line_by_line(values: list[object]) -> None:
    written = "".join(dumps(value) + "\n" for value in values)
    assert [json.loads(line) for line in lines_of(written)] == values
    assert [json.loads(line) for line in written.splitlines()] == values  # by whoever ends lines elsewhere too


@pytest.mark.slow
@given(st.lists(VALUES, min_size=1))
@example(["\u2028"])
def test_lines_of_others_are_read_too(values: list[object]) -> None:
    written = "\r\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n\n"
    assert [json.loads(line) for line in lines_of(written)] == values


def test_what_json_does_not_know() -> None:
    value = {"photo": b"\x00\xff", "inside": [{"vector": np.arange(2)}, np.float32(0.5)], "day": date(2026, 1, 2)}
    found = loads(dumps(value, plain))
    assert found == {"photo": b"\x00\xff", "inside": [{"vector": [0, 1]}, 0.5], "day": "2026-01-02"}
    assert loads(dumps(value, plain).encode()) == found and loads("[1]") == [1]
    with pytest.raises(TypeError):
        dumps(value)

"""A value stays on its line, whatever its texts hold."""

from __future__ import annotations

import json

from hypothesis import example, given, strategies as st

from openm6.json_lines import dumps, lines_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(VALUES, min_size=1))
@example(["\u2028", {"a\x85": "\u2029\x0b\x1c"}, "\r\n"])
def test_values_come_back_line_by_line(values: list[object]) -> None:
    written = "".join(dumps(value) + "\n" for value in values)
    assert [json.loads(line) for line in lines_of(written)] == values
    assert [json.loads(line) for line in written.splitlines()] == values  # by whoever ends lines elsewhere too


@given(st.lists(VALUES, min_size=1))
@example(["\u2028"])
def test_lines_of_others_are_read_too(values: list[object]) -> None:
    written = "\r\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n\n"
    assert [json.loads(line) for line in lines_of(written)] == values

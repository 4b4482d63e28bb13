"""Triples: written, read back, and refused where they are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from openm6.core.errors import DataError
from openm6.tasks.encode import encode_example
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task

part = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6)
TASK = Task.from_instruction("[triples:facts] -> [triples:facts]")


@settings(deadline=None)
@given(st.lists(st.tuples(part, part, part), min_size=1, max_size=5))
def test_triples_are_read_back(processor: Processor, facts: list[tuple[str, str, str]]) -> None:
    wide = Processor(processor.tokenizer, processor.grid, 2000)
    found = encode_example(TASK, {"facts": [list(f) for f in facts]}, wide)
    assert TASK.read([i for i in found.labels.tolist() if i >= 0], wide)["facts"] == [list(f) for f in facts]


def test_numbers_and_json_are_taken(processor: Processor) -> None:
    wide = Processor(processor.tokenizer, processor.grid, 500)
    for value in ([["裙", "价格", 199]], '[["裙", "价格", 199]]'):
        found = encode_example(TASK, {"facts": value}, wide)
        assert TASK.read([i for i in found.labels.tolist() if i >= 0], wide)["facts"] == [["裙", "价格", "199"]]


@pytest.mark.parametrize("value", ["no json", [], [["a", "b"]], [["a", "b", ""]], [["a", "b", True]], "3", [1, 2, 3]])
def test_what_is_no_triple_is_bad_data(processor: Processor, value: object) -> None:
    with pytest.raises(DataError, match="^facts: "):
        encode_example(Task.from_instruction("[triples:facts] -> [text:t]"), {"facts": value, "t": "红"}, processor)

"""A label has one spelling, wherever it comes from."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import DataError, UsageError
from openm6.tasks.encode import encode_example
from openm6.tasks.grammar import parse
from openm6.tasks.processor import Processor
from openm6.tasks.slots.label import normalize_label
from openm6.tasks.task import Task


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("正面 ", "正面"),
        ("\u3000好 \t 评\n", "好 评"),
        ("ＡＢ１", "AB1"),
        ("女装，大衣（厚）", "女装,大衣(厚)"),
        ("Good", "Good"),
    ],
)
def test_blanks_and_width_make_no_difference(written: str, label: str) -> None:
    assert normalize_label(written) == label


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=12))
def test_a_normalized_label_stays_as_it_is(text: str) -> None:
    assert normalize_label(normalize_label(text)) == normalize_label(text)


def test_spellings_of_one_label_are_trained_and_asked_alike(processor: Processor) -> None:
    task = Task.from_instruction("[label:kind] -> [label:mood]", labels={"mood": ["正面 ", "Ａ"]})
    assert task.labels["mood"] == ("正面", "A")
    found = [encode_example(task, {"kind": k, "mood": m}, processor) for k, m in ((" ７", "正面 "), ("7", "正面"))]
    assert found[0].ids.tolist() == found[1].ids.tolist() and found[0].labels.tolist() == found[1].labels.tolist()
    assert encode_example(task, {"kind": "7", "mood": "A"}, processor).labels.tolist() != found[0].labels.tolist()


def test_a_label_of_blanks_and_two_of_one_spelling_are_refused(processor: Processor) -> None:
    with pytest.raises(DataError, match="mood: is empty"):
        encode_example(Task.from_instruction("[text:x] -> [label:mood]"), {"x": "一", "mood": " \u3000"}, processor)
    with pytest.raises(UsageError, match="empty label"):
        Task.from_instruction("[text:x] -> [label:mood]", labels={"mood": ["好", " "]})
    with pytest.raises(UsageError, match="different labels"):
        parse("[text] -> [label|set=A,Ａ]")

"""Forms that decoding keeps: digits of a box, lines of a verse."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from openm6.core.errors import DataError
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.forms import FORMS, Digits, Verse, answer_constraint, form_of
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task


def walked(constraint: Digits | Verse, tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Any answer that the constraint lets through."""
    ids: list[int] = []
    while True:
        allowed = constraint.next(ids)
        assert allowed, ids
        token = rng.choice(list(allowed))
        if token == tokenizer.end_id:
            assert list(allowed) == [token]
            return ids
        ids.append(token)
        assert len(ids) < 500


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.randoms())
def test_every_verse_that_is_let_through_keeps_its_form(
    tokenizer: Tokenizer, lines: int, length: int, rng: random.Random
) -> None:
    text = tokenizer.decode(walked(Verse(lines, length, tokenizer), tokenizer, rng))
    assert len(text) == lines * (length + 1)
    for number in range(lines):
        line = text[number * (length + 1) :][: length + 1]
        assert all("\u4e00" <= c <= "\u9fff" for c in line[:-1])
        assert line[-1] == ("。" if number % 2 or number == lines - 1 else "，")


def test_forms_have_names_or_numbers() -> None:
    assert form_of("五言绝句") == (4, 5) and form_of("3x7") == (3, 7) and form_of(" 8 × 5 ") == (8, 5)
    assert all(form_of(name) == form for name, form in FORMS.items())
    for bad in ("", "绝句", "0x5", "5", "999x9", "-1x5"):
        with pytest.raises(DataError, match="no form of a verse"):
            form_of(bad)


def test_a_task_keeps_the_form_that_its_slot_names(processor: Processor) -> None:
    task = Task.from_instruction("[text:theme] [text:form] -> [text:poem|verse=form]")
    prompt = encode_prompt(task, {"theme": "红", "form": "2x3"}, processor)
    assert isinstance(prompt.constraint, Verse)
    text = processor.tokenizer.decode(walked(prompt.constraint, processor.tokenizer, random.Random(0)))
    assert [len(line) for line in text.replace("。", "，").split("，")] == [3, 3, 0]
    with pytest.raises(DataError, match="form: '散文' is no form"):
        encode_prompt(task, {"theme": "红", "form": "散文"}, processor)


def test_a_box_is_eight_digits(processor: Processor) -> None:
    task = Task.from_instruction("[image:photo] [text:what] -> [box:place]")
    trie = answer_constraint(task, {}, processor.tokenizer)
    assert isinstance(trie, Digits)
    ids = walked(trie, processor.tokenizer, random.Random(1))
    assert len(processor.tokenizer.decode(ids)) == 8
    place = task.read(ids, processor)["place"]
    assert len(place) == 4 and all(0 <= share <= 0.99 for share in place)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_box_is_read_back(processor: Processor, numbers: list[float]) -> None:
    task = Task.from_instruction("[box:a] -> [box:b]")
    left, right = sorted(numbers[:2])
    top, bottom = sorted(numbers[2:])
    if left == right or top == bottom:
        return
    box = [left, top, right, bottom]
    found = encode_example(task, {"a": box, "b": str(box)}, processor)
    ids = [i for i in found.labels.tolist() if i >= 0]
    assert task.read(ids, processor)["b"] == pytest.approx(box, abs=0.0101)


@pytest.mark.parametrize(
    "value", [[0, 0, 1], [0, 0, 1, 2], "red", [0.5, 0, 0.5, 1], [0, 1, 1, 0], {"a": 1}, [0, 0, "1", 1]]
)
def test_what_is_no_box_is_bad_data(processor: Processor, value: object) -> None:
    with pytest.raises(DataError, match="^b: "):
        encode_example(Task.from_instruction("[text:a] -> [box:b]"), {"a": "红", "b": value}, processor)

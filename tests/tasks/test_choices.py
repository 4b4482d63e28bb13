"""The labels that a prompt lists: the task's, those of the data, or those of a request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openm6.core.errors import DataError, UsageError
from openm6.core.sequence import TextTarget
from openm6.tasks.encode import encode_example, encode_prompt
from openm6.tasks.encode_source import LISTED
from openm6.tasks.library import get
from openm6.tasks.processor import Processor
from openm6.tasks.record import labels_of
from openm6.tasks.slots.choices import as_choices
from openm6.tasks.task import Task

TASK = Task.from_instruction("[text:a] 哪一类?{可选: [choices|of=kind]。} -> [label:kind]")


def prompt(task: Task, processor: Processor, **record: object) -> str:
    return processor.tokenizer.decode(encode_prompt(task, record, processor).ids.tolist())


def allowed(task: Task, processor: Processor, **record: object) -> set[str]:
    """The answers that decoding can give, followed token by token."""
    target = encode_prompt(task, record, processor).target
    assert isinstance(target, TextTarget) and target.constraint is not None
    found, waiting = set(), [()]
    while waiting:
        ids = waiting.pop()
        for token in target.constraint.next(ids):
            if token == processor.tokenizer.end_id:
                found.add(processor.tokenizer.decode(ids))
            else:
                waiting.append((*ids, token))
    return found


def test_a_prompt_lists_the_labels_of_the_task_in_their_order(processor: Processor) -> None:
    assert prompt(TASK.with_labels({"kind": ["红", "蓝"]}), processor, a="七") == "七哪一类?可选:红、蓝。"
    assert prompt(TASK.with_labels({"kind": ["good", "bad"]}), processor, a="七").endswith("可选:good, bad。")
    assert prompt(TASK, processor, a="七") == "七哪一类?"


def test_those_of_a_request_take_their_place_and_restrict_the_answer(processor: Processor) -> None:
    for task in (TASK, TASK.with_labels({"kind": ["红", "蓝"]})):
        for given in ("黄,绿", ["黄", "绿"], '["黄", "绿"]', "黄，绿 "):
            assert prompt(task, processor, a="七", choices=given) == "七哪一类?可选:黄、绿。"
            assert allowed(task, processor, a="七", choices=given) == {"黄", "绿"}
    assert allowed(TASK.with_labels({"kind": ["红", "蓝"]}), processor, a="七", choices="") == {"红", "蓝"}
    TASK.check({"a": "七"})
    assert TASK.schema()["inputs"]["required"] == ["a"]


def test_a_record_learns_one_of_its_own_choices(processor: Processor) -> None:
    found = encode_example(TASK, {"a": "七", "choices": ["黄", "绿"], "kind": "绿"}, processor)
    assert "黄、绿" in processor.tokenizer.decode(found.ids.tolist())
    with pytest.raises(DataError, match="kind: '红' is none of the record's labels.* They are: 黄, 绿"):
        encode_example(TASK, {"a": "七", "choices": ["黄", "绿"], "kind": "红"}, processor)


def test_a_large_set_is_not_listed_and_restricts_all_the_same(processor: Processor) -> None:
    many = tuple(f"{n}号" for n in range(10_000))
    task, wide = TASK.with_labels({"kind": many}), replace(processor, max_length=4096)
    assert prompt(task, wide, a="七") == "七哪一类?"
    assert prompt(TASK.with_labels({"kind": many[:LISTED]}), wide, a="七").endswith("、31号。")
    assert prompt(TASK.with_labels({"kind": many[: LISTED + 1]}), wide, a="七") == "七哪一类?"
    assert labels_of(task, {}, "kind") == many
    # Nor one that would take more than a quarter of a small model's positions.
    assert prompt(TASK.with_labels({"kind": many[:LISTED]}), processor, a="七") == "七哪一类?"


@pytest.mark.parametrize("value", [7, ["红", ""], [["红"]], "红,,蓝", "[红"])
def test_what_lists_no_labels_is_refused_by_its_slot(processor: Processor, value: object) -> None:
    problem = "choices: (has to be a list of labels|is empty, or has an empty label)"
    with pytest.raises(DataError, match=problem) as caught:
        encode_prompt(TASK, {"a": "七", "choices": value}, processor)
    assert caught.value.param == "choices"


def test_choices_have_one_spelling_as_labels_have() -> None:
    assert as_choices("好 ，坏，好") == ("好", "坏") and as_choices([1, "ＡＢ"]) == ("1", "AB")


def test_a_task_of_the_library_takes_them(processor: Processor) -> None:
    task, wide = get("text_classification_en"), replace(processor, max_length=512)
    assert prompt(task, wide, text="fine", choices="good,bad").startswith(
        "Which category does this text belong to? Choose one of: good, bad. Text: fine Category:"
    )
    with pytest.raises(UsageError, match="It takes: choices, text"):
        task.check({"text": "fine", "choice": "good,bad"})

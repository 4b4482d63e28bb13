"""The instructions of a stored model are those of its training, whichever format its card has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm6.core.errors import OpenM6Error
from openm6.tasks.card import NAME, read_card, write_card
from openm6.tasks.encode import encode_prompt
from openm6.tasks.library import get, names
from openm6.tasks.processor import Processor


def old_card(folder: Path, *instructions: str) -> None:
    """A card of format 1."""
    task = {"name": "old", "instructions": list(instructions)}
    (folder / NAME).write_text(json.dumps({"format": 1, "max_length": 64, "tasks": [task]}), "utf-8")


def test_a_card_keeps_every_task_of_the_library(processor: Processor, tmp_path: Path) -> None:
    tasks = [get(name) for name in names()]
    write_card(tmp_path, processor, tasks)
    assert read_card(tmp_path)[0] == tasks


def test_braces_of_an_old_card_are_plain_text(processor: Processor, tmp_path: Path) -> None:
    old_card(tmp_path, "用 {名} 与 }} 写[[注] [text:a] -> {[text:b]}")
    (task,), _, _ = read_card(tmp_path)
    assert [p if isinstance(p, str) else p.name for p in task.instructions[0].source] == ["用 {名} 与 }} 写[注]", "a"]
    assert [p if isinstance(p, str) else p.name for p in task.instructions[0].target] == ["{", "b", "}"]


def test_the_prompts_of_an_old_card_stay_as_they_were(processor: Processor, tmp_path: Path) -> None:
    """In format 1 no blank beside a slot was part of a text."""
    old_card(tmp_path, "Text:  [text:a] Is it good? -> [text:b]", "问: [text:a] 好吗 -> [text:b]")
    (task,), _, _ = read_card(tmp_path)
    tokenizer = processor.tokenizer
    expected = [*tokenizer.encode("Text:"), *tokenizer.encode("fine"), *tokenizer.encode("Is it good?")]
    assert encode_prompt(task, {"a": "fine"}, processor).ids.tolist() == [*expected, tokenizer.answer_id]
    assert task.instructions[1].text == "问: [text:a] 好吗 -> [text:b]"
    write_card(tmp_path, processor, [task])
    assert read_card(tmp_path)[0] == [task]


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"format": 9, "max_length": 64, "tasks": []}), "utf-8")
    with pytest.raises(OpenM6Error, match=r"openm6.json has the format 9; this version of OpenM6 reads 2"):
        read_card(tmp_path)

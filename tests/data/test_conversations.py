"""Conversations in the layouts of others, as messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openm6.core.errors import DataError, UsageError
from openm6.data.columns import SlotView
from openm6.data.conversations import TurnRecords, conversation_key, conversation_of
from openm6.data.source import open_source
from openm6.data.store import ListRecords
from openm6.tasks.library import get

CHAT = get("chat")
U, A = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
PICTURE = {"type": "image", "image": "a.jpg"}

LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "openai": ({"messages": [U, A]}, [U, A]),
    "openai-parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}, PICTURE]}, A]},
        [{"role": "user", "content": [{"type": "text", "text": "问"}, PICTURE]}, A],
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, [U, A]),
    "sharegpt-system": (
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "短"},
        [{"role": "system", "content": "短"}, U, A],
    ),
    "sharegpt-tools": (
        {"conversations": [
            {"from": "human", "value": "问"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "答"},
        ]},
        [U, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {}}}
        ]}, {"role": "tool", "content": "3"}, A],
    ),
    "llava": (
        {"conversations": [{"from": "human", "value": "<image>\n问"}, {"from": "gpt", "value": "答"}],
         "image": "a.jpg"},
        [{"role": "user", "content": [PICTURE, {"type": "text", "text": "问"}]}, A],
    ),
    "marks": (
        {"messages": [{"role": "user", "content": "甲<image>乙<image>"}, A], "images": ["a.jpg", "b.jpg"]},
        [{"role": "user", "content": [
            {"type": "text", "text": "甲"}, PICTURE, {"type": "text", "text": "乙"}, {"type": "image", "image": "b.jpg"}
        ]}, A],
    ),
    "alpaca": ({"instruction": "问", "input": "", "output": "答"}, [U, A]),
    "alpaca-input": (
        {"instruction": "译", "input": "早", "output": "早安", "history": [["问", "答"]]},
        [U, A, {"role": "user", "content": "译\n早"}, {"role": "assistant", "content": "早安"}],
    ),
    "swift": (
        {"query": "问", "response": "答", "system": "短", "images": ["a.jpg"]},
        [{"role": "system", "content": "短"},
         {"role": "user", "content": [PICTURE, {"type": "text", "text": "问"}]}, A],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_told_by_its_columns(name: str, tmp_path: Path) -> None:
    record, messages = LAYOUTS[name]
    key = conversation_key(record)
    assert key is not None and conversation_of(record, key) == messages
    (tmp_path / "talks.jsonl").write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    source = open_source(str(tmp_path / "talks.jsonl"))
    seen = SlotView.of(CHAT, source)(source[0])
    assert seen["answer"] == messages[-1]["content"] and len(seen["messages"]) == len(messages) - 1
    pictures = [p for m in seen["messages"] if isinstance(m["content"], list) for p in m["content"] if "image" in p]
    assert all(part["image"].startswith(str(tmp_path)) for part in pictures)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "judge", "content": "a"}, A]}, "message 1 has the role 'judge'; there are: system, user"),
    ({"messages": [U, "a"]}, "message 2 is no object"),
    ({"messages": "a"}, "is a text, but not the JSON of messages"),
    ({"messages": []}, "has to be messages"),
    (
        {"messages": [{"role": "user", "content": "<image><image>"}, A], "images": ["a.jpg"]},
        "2 marks <image> and 1 pict",
    ),
    ({"instruction": "a", "output": "b", "history": ["c"]}, "history has to be pairs"),
    ({"conversations": [{"from": "function_call", "value": "{"}]}, "message 1 is no JSON of a function call"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_no_conversation_is_told(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        conversation_of(record, next(key for key in record if key != "images"))


def test_data_without_conversations_are_refused_by_their_columns() -> None:
    with pytest.raises(UsageError, match=r"chat needs conversations, and the data's columns \(text, label\) hold none"):
        SlotView.of(CHAT, ListRecords([{"text": "a", "label": "b"}]))


def test_each_answer_is_an_example_of_its_own_where_asked() -> None:
    talks = [{"messages": [U, A, U, {"role": "assistant", "content": "再答"}], "_where": "f:1"}, {"messages": [U, A]},
             {"messages": [U]}, {"messages": [{"role": "judge"}]}]  # fmt: skip
    each = TurnRecords(ListRecords(talks), "messages", "all")
    assert len(each) == 5
    assert [len(each[i]["messages"]) for i in range(4)] == [2, 4, 2, 1]
    assert each[1]["_where"] == "f:1" and each[1]["_turns"] == "last"
    with pytest.raises(DataError, match="judge"):
        each[4]
    assert len(TurnRecords(ListRecords(talks), "messages", "last")) == 4

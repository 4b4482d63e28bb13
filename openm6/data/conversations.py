"""Conversations in records, in the usual layouts, recognized by their columns:

    messages                                OpenAI: [{"role", "content"}], with `tools`
    conversations                           ShareGPT: [{"from": "human" | "gpt" | ..., "value"}], with `system`, `tools`
    conversations, image(s)                 LLaVA: `<image>` marks in the texts
    instruction, input, output              Alpaca, with `history`, `system`
    query, response                         ms-swift, with `history`, `system`, `images`

Pictures of a record (`images`, `image`) take the places of the marks `<image>`, in any layout."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from openm6.core.errors import DataError, cut, suggest
from openm6.data.store import HIDDEN, Record, Records
from openm6.tasks.chat import ROLES
from openm6.tasks.encode import ANSWER, TURNS
from openm6.tasks.slots.messages import KEPT, text_of
from openm6.tasks.slots.text import from_json

_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("instruction", "output"), ("query", "response"))
_PICTURES = ("images", "image")
_MARK = re.compile(r"\n?<image>\n?")
_SPEAKERS = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "developer": "system", "observation": "tool", "function_response": "tool", "function": "tool",
    "function_call": "assistant", **{role: role for role in ROLES},
}  # fmt: skip
"""Speakers of all layouts, and their roles."""


def conversation_key(record: Record) -> str | None:
    """The column by which a record is a conversation; None for any other record."""
    for key in _LISTS:
        turns = record.get(key)
        if (
            isinstance(turns, list)
            and turns
            and all(isinstance(t, dict) and {"role", "from"} & t.keys() for t in turns)
        ):
            return key
    return next((first for first, last in _PAIRS if {first, last} <= record.keys()), None)


def conversation_of(record: Record, key: str) -> list[dict[str, Any]]:
    """The messages of a record, in the layout of OpenAI's API, pictures as parts of their contents. Raises DataError,
    with the number of the message, for one that cannot be read."""
    pairs = dict(_PAIRS).get(key)
    messages = _of_pairs(record, key, pairs) if pairs else _of_list(record.get(key))
    system = record.get("system") or record.get("system_prompt")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return _with_pictures(messages, record)


def split_answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Messages as the slots of a conversation: what is asked, and the answer, where it ends with one."""
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        return {"messages": messages}
    return {"messages": messages[:-1], "answer": text_of(messages[-1]) or None, ANSWER: messages[-1]}


class TurnRecords:
    """Records of conversations with an example for each answer (`all`), or one whose last answer alone is learned."""

    def __init__(self, records: Records, key: str, turns: str):
        self._records, self._key, self._each = records, key, turns == "all"
        self.columns = ("messages", "tools")
        counts = (self._count(records[i]) for i in range(len(records))) if self._each else [1] * len(records)
        self._stops = list(accumulate(counts))

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int) -> Record:
        number = bisect_right(self._stops, index % len(self))
        record = self._records[number]
        messages = conversation_of(record, self._key)
        if self._each:
            answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            place = index - (self._stops[number - 1] if number else 0)
            messages = messages[: answers[place] + 1] if answers else messages
        kept = {name: record[name] for name in (*HIDDEN, "tools") if name in record}
        return {**kept, "messages": messages, TURNS: "last"}

    def _count(self, record: Record) -> int:
        try:
            answers = sum(message["role"] == "assistant" for message in conversation_of(record, self._key))
        except DataError:  # reported when the record is read
            return 1
        return max(1, answers)


def _of_list(value: Any) -> list[dict[str, Any]]:
    value = from_json(value, "is a text, but not the JSON of messages.")
    if not isinstance(value, list) or not value:
        raise DataError('has to be messages: [{"role": "user", "content": "..."}, ...].')
    found = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"message {number} is no object with a role and a content.")
        speaker = turn.get("role", turn.get("from"))
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = suggest(str(speaker), list(_SPEAKERS))
            raise DataError(
                f"message {number} has the role {cut(repr(speaker))}; there are: {', '.join(ROLES)}.{known}"
            )
        message = {"role": role, "content": turn.get("content", turn.get("value"))}
        if speaker == "function_call":  # ShareGPT: the call as JSON
            call = from_json(message["content"], f"message {number} is no JSON of a function call.")
            message = {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call}]}
        found.append(message | {name: turn[name] for name in KEPT if turn.get(name)})
    return found


def _of_pairs(record: Record, key: str, answer: str) -> list[dict[str, Any]]:
    history = from_json(record.get("history") or [], "history is no JSON.")
    if not isinstance(history, list) or not all(isinstance(one, (list, tuple)) and len(one) == 2 for one in history):
        raise DataError("history has to be pairs of a question and its answer.")
    asked = "\n".join(str(text) for text in (record.get(key), record.get("input")) if text)
    turns = [*history, (asked, record.get(answer))]
    found = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
        if text or role == "user"
    ]
    return found


def _with_pictures(messages: list[dict[str, Any]], record: Record) -> list[dict[str, Any]]:
    given: Any = next((record[name] for name in _PICTURES if record.get(name)), [])
    pictures = given if isinstance(given, list) else [given]
    marks = sum(len(_MARK.findall(m["content"])) for m in messages if isinstance(m["content"], str))
    if not pictures:
        return messages
    if not marks:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        return [
            {**m, "content": [*_parts(pictures), *_texts(m["content"])]} if m is first else m for m in messages
        ]  # fmt: skip
    if marks != len(pictures):
        raise DataError(f"has {marks} marks <image> and {len(pictures)} pictures.")
    waiting = iter(pictures)
    return [{**m, "content": _marked(m["content"], waiting)} for m in messages]


def _marked(content: Any, pictures: Iterator[Any]) -> Any:
    if not isinstance(content, str) or not _MARK.search(content):
        return content
    first, *others = _MARK.split(content)
    return [*_texts(first), *(part for text in others for part in (*_parts([next(pictures)]), *_texts(text)))]


def _parts(pictures: list[Any]) -> list[dict[str, Any]]:
    return [{"type": "image", "image": picture} for picture in pictures]


def _texts(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []

"""The chat form of an imported model: its checkpoint's own template, by which a conversation is laid out.

Special tokens come from the template, never from a text: names of special tokens in texts, pictures, and texts that
may be cut are passed through the template as marks (private characters of Unicode). What it writes is split at its
special tokens; each stretch between them is encoded whole, as one tokenizer call would, because a newline of the
template may share a token with the text behind it."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence as Items
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property
from typing import Any

from openm6.core.errors import DataError, UsageError, cut
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.piece import Piece
from openm6.tasks.sandbox import run_template

TEMPLATE = "chat_template.jinja"
"""File of a model directory with its template."""

ROLES = ("system", "user", "assistant", "tool")

_THINK, _THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class ChatFormat:
    """How a model is asked: by its template.

    template    Jinja source
    tokens      special tokens by the names that templates use (`bos_token`, `eos_token`, ...)
    date        the date that a template writes (Llama 3), ISO 8601
    thinking    whether the model reasons before it answers, where its template has a switch
    system      system text of requests and tasks without one; "": the template's own
    sampling    decoding options of answers in free text, of the checkpoint's generation_config.json"""

    template: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    date: str = "2025-01-01"
    thinking: bool = False
    system: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def reasons(self) -> bool:
        """Whether the model writes its reasoning between `<think>` and `</think>`."""
        return _THOUGHT in self.template

    @cached_property
    def keeps_turns(self) -> bool:
        """Whether a conversation begins as its shorter ones do, so that all its answers can be learned in one example.
        Qwen3's template leaves the reasoning of earlier answers out."""
        user, answer = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
        turns = [user, answer, user, answer]
        whole = self.render(turns)
        return all(whole.startswith(self.render(turns[:n], is_open=True)) for n in (1, 3))

    @cached_property
    def has_system(self) -> bool:
        """Whether the template has a place for a system text."""
        try:
            return "\ue000" in self.render([{"role": "system", "content": "\ue000"}, {"role": "user", "content": "1"}])
        except DataError:
            return False

    def render(
        self, messages: Items[Mapping[str, Any]], is_open: bool = False, thinking: bool | None = None,
        tools: Items[Mapping[str, Any]] = (),
    ) -> str:  # fmt: skip
        """The text of messages of JSON values; `is_open`: up to where an answer begins.

        Raises DataError, with the template's reason, for messages that it refuses, and for one that takes too long."""
        values = {
            **self.tokens, "messages": messages, "tools": list(tools) or None, "documents": None,
            "add_generation_prompt": is_open, "enable_thinking": self.thinking if thinking is None else thinking,
            "date_string": Date.fromisoformat(self.date).strftime("%d %b %Y"),
        }  # fmt: skip
        return run_template(self.template, self.date, values)

    def lay_out(
        self, messages: Items[Message], tokenizer: Tokenizer, thinking: bool | None = None,
        tools: Items[Mapping[str, Any]] = (), learn: str = "",
    ) -> list[Piece]:  # fmt: skip
        """The pieces of a conversation up to where its answer begins. With `learn` it ends with an answer, which is
        marked as learned; "all": earlier ones too.

        Raises DataError for what the template refuses, and for answers that it would not write where they are asked."""
        marks = _Marks(messages, tools, tokenizer)
        shown = self._with_system(marks.messages)
        if not learn:
            return marks.pieces(self.render(shown, True, thinking, marks.tools), [])
        whole, starts = self.render(shown, False, thinking, marks.tools), []
        for number, message in enumerate(shown):
            is_last = number == len(shown) - 1
            if message["role"] == "assistant" and (is_last or learn == "all"):
                asked = (self.render(shown[:number], True, way, marks.tools) for way in (thinking, True))
                start = next((len(one) for one in asked if whole.startswith(one)), None)
                if start is None:
                    raise DataError(
                        f"message {number + 1}: the model's template lays this answer out in another way than it asks "
                        "for one."
                    )
                starts.append(start)
        return marks.pieces(whole, starts)

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the system text, if any, where the template has a place for it."""
        if messages[0]["role"] != "system" or self.has_system or len(messages) < 2:
            return messages
        system, first, *others = messages
        return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]

    def is_thinking(self, thinking: bool | None) -> bool:
        """Whether an answer begins with reasoning; None: by the format's default."""
        return self.reasons and (self.thinking if thinking is None else thinking)

    def answer_start(self, ids: list[int], tokenizer: Tokenizer) -> int | None:
        """The place in generated ids where the reasoning has ended and the answer begins; None: it has not ended."""
        if _THOUGHT not in tokenizer.decode(ids):
            return None
        start = bisect_left(range(len(ids)), True, key=lambda count: _THOUGHT in tokenizer.decode(ids[:count]))
        while start < len(ids) and not tokenizer.decode(ids[start : start + 1]).strip():
            start += 1
        return start

    def without_marks(self, text: str) -> str:
        """A piece of reasoning without the mark at its beginning."""
        return text.replace(_THINK, "").lstrip() if _THINK in text else text

    def split_reasoning(self, ids: list[int], tokenizer: Tokenizer) -> tuple[str, list[int]]:
        """The reasoning in generated ids, and the ids of the answer."""
        if not self.reasons:
            return "", ids
        start = self.answer_start(ids, tokenizer)
        thought, _, _ = tokenizer.decode(ids[:start]).partition(_THOUGHT)
        if start is None and not thought.lstrip().startswith(_THINK):
            return "", ids
        return thought.partition(_THINK)[2].strip() or thought.strip(), [] if start is None else ids[start:]


Message = Mapping[str, Any]
"""A message: `role`, and `content`, a text or a list of texts and Pieces; and what else a template reads."""


class _Marks:
    """Messages with marks in place of all that a template must not see, and what the marks stand for.

    A mark is a private character, digits, and the character again; the character occurs in no text."""

    def __init__(self, messages: Items[Message], tools: Items[Mapping[str, Any]], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        said = "".join(_strings([*messages, *tools]))
        sign = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said), None)
        if sign is None:
            raise DataError("has all private characters of Unicode.")
        self._sign, self._meaning = sign, list[Piece | str | bool]()
        names = sorted(map(re.escape, tokenizer.special), key=len, reverse=True)
        self._special = re.compile("|".join(names))
        self._split = re.compile(f"({sign}[0-9]+{sign}|{'|'.join(names)})")
        self.messages = [self._marked(message) for message in messages]
        self.tools = [self._escaped(tool) for tool in tools]

    def _mark(self, meaning: Piece | str | bool) -> str:
        self._meaning.append(meaning)
        return f"{self._sign}{len(self._meaning) - 1}{self._sign}"

    def _escaped(self, value: Any) -> Any:
        """A value of JSON whose texts have marks for the names of special tokens."""
        if isinstance(value, str):
            return self._special.sub(lambda found: self._mark(found[0]), value)
        if isinstance(value, Mapping):
            return {key: self._escaped(one) for key, one in value.items()}
        return [self._escaped(one) for one in value] if isinstance(value, list) else value

    def _marked(self, message: Message) -> dict[str, Any]:
        content = message.get("content")
        parts = content if isinstance(content, list) else [content or ""]
        shown = "".join(map(self._part, parts))
        return {**{key: self._escaped(one) for key, one in message.items()}, "content": shown}

    def _part(self, part: Piece | str) -> str:
        if isinstance(part, str):
            return str(self._escaped(part))
        if part.text is None:
            return self._mark(part)
        if not part.cuttable or not (core := part.text.strip()):
            return str(self._escaped(part.text))
        # Blanks stay outside, where a template finds and strips them.
        before, _, after = part.text.partition(core)
        return f"{before}{self._mark(True)}{self._escaped(core)}{self._mark(False)}{after}"

    def pieces(self, text: str, starts: list[int]) -> list[Piece]:
        """What a template wrote, as pieces. `starts`: where the answers in it begin; each ends with the next end token.
        With any, what follows the last answer is left out."""
        pieces, stretch = list[Piece](), _Stretch(self._tokenizer)
        place, learned, waiting = 0, False, list(starts)
        for part in self._split.split(text):
            begun = place
            place += len(part)
            token = self._tokenizer.special.get(part)
            if token is None and not part.startswith(self._sign):
                while waiting and begun <= waiting[0] <= place and part:
                    cut_at, learned = waiting.pop(0) - begun, True
                    stretch.add(part[:cut_at])
                    stretch.switch(learned=True)
                    part, begun = part[cut_at:], begun + cut_at
                stretch.add(part)
                continue
            if waiting and waiting[0] <= begun:
                waiting.pop(0)
                learned = True
                stretch.switch(learned=True)
            meaning = self._meaning[int(part.strip(self._sign))] if token is None else Piece((token,))
            if isinstance(meaning, str):
                stretch.add(meaning)
            elif isinstance(meaning, bool):
                stretch.switch(cuttable=meaning)
            else:
                pieces += stretch.flush()
                pieces.append(meaning._replace(learned=learned))
                if learned and token in self._tokenizer.end_ids:
                    learned = False
                    stretch.switch(learned=False)
                    if not waiting:
                        return pieces
        if starts:
            raise DataError("the model's template does not end the answer with one of the model's end tokens.")
        return [*pieces, *stretch.flush()]


class _Stretch:
    """A text between two special tokens, and where in it cuttable and learned stretches begin and end."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._text = tokenizer, ""
        self._state = {"cuttable": False, "learned": False}
        self._changes = [(0, False, False)]

    def add(self, text: str) -> None:
        self._text += text

    def switch(self, **state: bool) -> None:
        self._state |= state
        self._changes.append((len(self._text), self._state["cuttable"], self._state["learned"]))

    def flush(self) -> list[Piece]:
        """The pieces of the stretch, encoded whole. A token over the edge of a cuttable text is not cut; one over the
        beginning of an answer is learned."""
        found: list[Piece] = []
        if self._text:
            changes, runs = self._changes, list[tuple[tuple[bool, bool], list[int]]]()
            at, last = 0, 0
            for token, stop in self._tokenizer.encode_placed(self._text):
                while at + 1 < len(changes) and changes[at + 1][0] < stop:
                    at += 1
                start, cuttable, learned = changes[at]
                state = (cuttable and last >= start, learned)
                last = max(last, stop)
                if not runs or runs[-1][0] != state:
                    runs.append((state, []))
                runs[-1][1].append(token)
            found = [Piece(tuple(ids), None, cuttable, learned=learned) for (cuttable, learned), ids in runs]
        self._text, self._changes = "", [(0, self._state["cuttable"], self._state["learned"])]
        return found


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value, of Pieces too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Piece):
        yield value.text or ""
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def sampling_of(generation: Mapping[str, Any]) -> dict[str, float]:
    """The decoding options of a generation_config.json: its sampling, where it samples."""
    penalty = {"repetition_penalty": generation["repetition_penalty"]} if generation.get("repetition_penalty") else {}
    if not generation.get("do_sample"):
        return penalty
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' GenerationConfig
    return {name: generation.get(name) or value for name, value in usual.items()} | penalty


def end_of(chat: ChatFormat, special: Iterable[str]) -> str:
    """The special token that a template writes after an answer. Raises UsageError where there is none."""
    names = sorted(map(re.escape, special), key=len, reverse=True)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "\ue000"}]
    rest = chat.render(turns).rpartition("\ue000")[2]
    found = re.search("|".join(names), rest) if names else None
    if found is None:
        raise UsageError(
            "The chat template writes no special token after an answer, so that none would end: "
            f"it writes {cut(json.dumps(rest, ensure_ascii=False))}."
        )
    return found[0]

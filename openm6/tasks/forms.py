"""Constraints on the form of an answer in decoding: digits of a box, lines of a verse, whole characters, labels."""

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

from openm6.core.errors import DataError
from openm6.core.sequence import Banned, Constraint
from openm6.core.tokenizer import HALF, Tokenizer
from openm6.tasks import target
from openm6.tasks.chat import ChatFormat
from openm6.tasks.grammar import slots_of
from openm6.tasks.record import Record, labels_of, slot_errors, value_of
from openm6.tasks.slots import box
from openm6.tasks.slots.text import as_text
from openm6.tasks.task import Task

FORMS = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}
"""Classical forms: lines, characters a line. Others are written 3x5 (three lines of five characters)."""

LINES, LENGTH = 64, 64
"""Maximum lines of a form, and characters a line."""


def form_of(text: str) -> tuple[int, int]:
    """Lines and characters a line of a form. Raises DataError for an unknown one."""
    if text in FORMS:
        return FORMS[text]
    found = re.fullmatch(r"\s*(\d{1,4})\s*[x×*]\s*(\d{1,4})\s*", text)
    lines, length = (int(n) for n in found.groups()) if found else (0, 0)
    if not (1 <= lines <= LINES and 1 <= length <= LENGTH):
        raise DataError(
            f"{text[:20]!r} is no form of a verse: one of {', '.join(FORMS)}, or lines x characters, as in 4x6 "
            f"(at most {LINES}x{LENGTH})."
        )
    return lines, length


class Digits:
    """Exactly `count` digits."""

    def __init__(self, count: int, tokenizer: Tokenizer):
        self._count, self._end_id = count, tokenizer.end_id
        self._digits = tuple(tokenizer.encode(str(digit))[0] for digit in range(10))

    def next(self, prefix: Sequence[int]) -> Sequence[int]:
        return self._digits if len(prefix) < self._count else (self._end_id,)


class Verse:
    """Lines of `length` Chinese characters, with a comma after odd lines, a full stop after even ones and the last."""

    def __init__(self, lines: int, length: int, tokenizer: Tokenizer):
        self._lines, self._length, self._end_id = lines, length, tokenizer.end_id
        self._words = _words(tokenizer)
        self._comma, self._stop = (tuple(tokenizer.encode(mark)) for mark in "，。")
        # Characters of each token, to follow the position in the verse.
        self._lengths = {token: length for length, tokens in self._words.items() for token in tokens}

    def next(self, prefix: Sequence[int]) -> Sequence[int]:
        line = inside = place = 0
        while place < len(prefix):
            if inside < self._length:
                inside += self._lengths.get(prefix[place], self._length)
                place += 1
                continue
            mark = self._mark(line)
            if len(prefix) - place < len(mark):  # a mark of several tokens, incomplete
                return (mark[len(prefix) - place],)
            line, inside, place = line + 1, 0, place + len(mark)
        if line == self._lines:
            return (self._end_id,)
        if inside >= self._length:
            return self._mark(line)[:1]
        room = self._length - inside
        return [token for length, tokens in self._words.items() if length <= room for token in tokens]

    def _mark(self, line: int) -> tuple[int, ...]:
        return self._stop if line % 2 or line == self._lines - 1 else self._comma


class Characters:
    """Any text of whole characters: the bytes of a character follow each other as in UTF-8, with nothing between.

    U+FFFD, the mark of a damaged text, is never written, neither in bytes nor as a token: an answer does not repeat
    damage in its prompt or in the training data. Nor are the tokens appended to the vocabulary of an imported model,
    whose rows were never trained."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._following: dict[bytes, Sequence[int]] = {}

    def next(self, prefix: Sequence[int]) -> Sequence[int]:
        begun = self._tokenizer.begun(prefix)
        found = self._following.get(begun)
        if found is None:
            fits = {token: _is_beginning(begun + more) for token, more in self._tokenizer.parts.items()}
            chosen = [token for token, fit in fits.items() if fit == bool(begun)]
            never = (*self._tokenizer.damaged, *self._tokenizer.unwritten)
            found = tuple(chosen) if begun else Banned((*chosen, *never))
            self._following[begun] = found
        return found


def _is_beginning(data: bytes) -> bool:
    """Whether UTF-8 without U+FFFD may begin with `data`."""
    try:
        return HALF not in getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False


@lru_cache(maxsize=8)
def characters(tokenizer: Tokenizer) -> Characters | None:
    """The constraint of texts without a form; None where all tokens have whole characters, none of them U+FFFD."""
    return Characters(tokenizer) if tokenizer.parts or tokenizer.damaged or tokenizer.unwritten else None


class AfterReasoning:
    """A constraint on what follows a model's reasoning, which is any text."""

    def __init__(self, constraint: Constraint, chat: ChatFormat, tokenizer: Tokenizer):
        self._constraint, self._chat, self._tokenizer = constraint, chat, tokenizer
        self._free = Characters(tokenizer)

    def next(self, prefix: Sequence[int]) -> Sequence[int]:
        start = self._chat.answer_start(list(prefix), self._tokenizer)
        return self._free.next(prefix) if start is None else self._constraint.next(prefix[start:])


@lru_cache(maxsize=8)
def _words(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Tokens of Chinese characters alone, by the number of characters."""
    found: dict[int, list[int]] = {}
    for token in range(tokenizer.code_start):
        text = "" if tokenizer.is_part(token) else tokenizer.decode([token])
        if text and all("\u4e00" <= character <= "\u9fff" for character in text):
            found.setdefault(len(text), []).append(token)
    return {length: tuple(tokens) for length, tokens in found.items()}


_END = -1


class Trie:
    """A constraint to answers of a closed set, each a list of token ids; `end_id` follows a complete one."""

    def __init__(self, answers: Iterable[Sequence[int]], end_id: int):
        self._root: dict[int, Any] = {}
        self._end_id = end_id
        for answer in answers:
            node = self._root
            for token in answer:
                node = node.setdefault(int(token), {})
            node[_END] = {}
        if not self._root:
            raise ValueError("a trie needs at least one answer")

    def next(self, prefix: Sequence[int]) -> list[int]:
        """The ids that may follow `prefix`; none when no answer begins with it."""
        node = self._root
        for token in prefix:
            found = node.get(int(token)) if int(token) != _END else None
            if found is None:
                return []
            node = found
        return [self._end_id if token == _END else token for token in node]


_ANSWERS = 100_000
"""Largest number of closed answers (combinations of labels) to which decoding is restricted."""


def answer_constraint(task: Task, record: Record, tokenizer: Tokenizer) -> Constraint | None:
    """The constraint of an answer of labels from known sets (the record's choices, else the task's), of one box, or of
    one verse; else None. Raises DataError for a record with an unknown form of verse."""
    side = task.instructions[0].target
    slot = task.slots[task.outputs[0]] if len(side) == 1 and len(task.outputs) == 1 else None
    if slot and slot.type == "box":
        return Digits(box.DIGITS, tokenizer)
    if slot and (verse := slots_of(side)[slot.name].verse):
        form = task.slots[verse]
        value = value_of(task, record, form)
        with slot_errors(record, form):
            return Verse(*form_of(as_text(value)), tokenizer)
    sets = tuple(labels_of(task, record, name) for name in task.outputs)
    return _trie(side, sets, tokenizer) if all(sets) and prod(map(len, sets)) <= _ANSWERS else None


@lru_cache(maxsize=64)
def _trie(side: tuple[Any, ...], sets: tuple[tuple[str, ...], ...], tokenizer: Tokenizer) -> Trie:
    names = list(slots_of(side))
    answers = (
        target.join(side, {n: tokenizer.encode(v) for n, v in zip(names, values, strict=True)}, tokenizer)
        for values in product(*sets)
    )
    return Trie(answers, tokenizer.end_id)

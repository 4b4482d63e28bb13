"""Limits on the content and length of a text, kept while it is generated.

    forbid     words that never occur
    numbers    the only numbers that occur: those of these texts, each as a whole (numbers.py)
    values     the only known values that occur (values.py)
    least, most   characters, counted as they are written

Near `most` the text is led to its end: a clause ends in a full stop instead of a comma, and after a sentence nothing
else begins.

Words and numbers are matched by characters, independently of the tokenization, bytes included. A character spelt in
bytes counts when it is complete: `Limits.broken_by` checks the whole text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Protocol

from openm6.core.errors import UsageError
from openm6.core.sequence import Banned
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.forms import characters
from openm6.tasks.numbers import GivenNumbers, plain
from openm6.tasks.values import OwnValues


class Rule(Protocol):
    """A rule about the content of a text, applicable to a text that is not complete yet."""

    def wrong(self, text: str, ended: bool = True) -> str:
        """The violation in a text; "" if there is none, or, in a text that has not `ended`, if its continuation may
        repair it."""

    def tail(self, text: str) -> str:
        """The end of a text that restricts its continuation; "" where it does not."""

    def follows(self, tail: str) -> Iterable[str]:
        """The plain characters that change how the tail is read."""

    def holds(self, word: str) -> bool:
        """Whether a word after an empty tail may violate the rule."""


_SENTENCE = re.compile(r".*[。！？!?][”』」）)]*", re.DOTALL)
_CLOSERS, _BREAKS, _STOP = "”』」）)", "，；,;", "。"

NEAR = 10
"""Characters before `most` within which a text is led to its end: there is room for one more clause."""


class Limits:
    """A constraint of decoding (sequence.Constraint)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        forbid: Iterable[str] = (),
        numbers: Iterable[str] | None = None,
        least: int = 0,
        most: int = 0,
        values: OwnValues | None = None,
    ):
        self._tokenizer, self.forbid = tokenizer, tuple(dict.fromkeys(forbid))
        given = None if numbers is None else GivenNumbers(numbers)
        self.rules: tuple[Rule, ...] = tuple(rule for rule in (given, values) if rule is not None)
        self._against: dict[tuple[Rule, str], frozenset[int]] = {}
        self.least, self.most = least, most
        if any(not word.strip() for word in self.forbid):
            raise UsageError("A forbidden word is empty.")
        if most and least > most:
            raise UsageError(f"A text of at least {least} and at most {most} characters cannot be.")
        self._reach = max(map(len, self.forbid), default=1) - 1
        self._texts, self._characters = _texts(tokenizer), characters(tokenizer)
        self._always = frozenset(token for word in self.forbid for token in _holding(tokenizer, word))
        self._closers = {token for mark in _CLOSERS for token in _holding(tokenizer, mark)}
        stop = next((token for token in _starting(tokenizer, _STOP) if self._texts[token] == _STOP), None)
        self._stops = {} if stop is None else {i: stop for mark in _BREAKS for i in _starting(tokenizer, mark)}
        self._rests: dict[str, list[str]] = {}  # the missing rest of a word, by its beginning
        for word in self.forbid:
            for cut in range(1, len(word)):
                self._rests.setdefault(word[:cut], []).append(word[cut:])

    def next(self, prefix: Sequence[int]) -> Sequence[int]:
        text = self._tokenizer.decode(list(prefix))
        if self.most and len(text) >= self.most:
            return (self._tokenizer.end_id,)
        banned, stops = set(self._always), dict[int, int]()
        for length in range(1, min(self._reach, len(text)) + 1):
            for rest in self._rests.get(text[-length:], ()):
                banned.update(_starting(self._tokenizer, rest))
        for word in self.forbid:
            if self._spelled(prefix, word):
                banned.add(self._tokenizer.class_ids[word.encode()[-1]])
        if self.most:
            room = self.most - len(text)
            lengths = _by_length(self._tokenizer).items()
            banned.update(token for length, tokens in lengths if length > room for token in tokens)
            if room <= NEAR and len(text) >= self.least:
                if text == whole_sentences(text) != "":
                    return (self._tokenizer.end_id, *(i for i in self._closers if i not in banned))
                if not text[-1:].isascii():  # a comma in 1,299 or among Latin letters ends no Chinese clause
                    stops = self._stops
        begun = self._tokenizer.begun(prefix)
        for rule in self.rules:
            tail = rule.tail(text)
            banned |= self._broken_after(rule, tail)
            banned |= self._broken_by_bytes(rule, tail, begun)
        if len(text) < self.least:
            banned.add(self._tokenizer.end_id)
        whole = self._characters.next(prefix) if self._characters else Banned()
        if isinstance(whole, Banned):
            banned.update(whole)
            stops = {} if banned.intersection(stops.values()) else stops
            return Banned(banned.union(stops), stops)
        return [token for token in whole if token not in banned]

    def _spelled(self, prefix: Sequence[int], word: str) -> bool:
        """Whether only the last byte of a word is missing, its last character being spelt in bytes."""
        *begun, _ = word[-1].encode()
        if not begun:  # an ASCII byte has a text
            return False
        ids = [self._tokenizer.class_ids[byte] for byte in begun]
        place = len(prefix) - len(ids)
        return (
            place >= 0
            and list(prefix[place:]) == ids
            and self._tokenizer.decode(list(prefix[:place])).endswith(word[:-1])
        )

    def _broken_after(self, rule: Rule, tail: str) -> frozenset[int]:
        """Tokens that violate a rule after a tail, whatever follows them. A tail that violates it already, as one spelt
        in bytes may, forbids nothing: `broken_by` reports it."""
        if (rule, tail) in self._against:
            return self._against[rule, tail]
        found: set[int] = set()
        if not tail:
            found.update(i for i in _mattering(self._tokenizer, rule.holds) if rule.wrong(self._texts[i], False))
        elif not rule.wrong(tail, False):
            starting = _by_first(self._tokenizer)
            others = starting.keys() - (going_on := starting.keys() & set(rule.follows(tail)))
            if rule.wrong(tail):  # it has to go on
                found.update(i for first in others for i in starting[first])
                found.add(self._tokenizer.end_id)
            else:
                found.update(self._broken_after(rule, "").difference(i for first in going_on for i in starting[first]))
            found.update(i for c in going_on for i in starting[c] if rule.wrong(tail + self._texts[i], False))
        self._against[rule, tail] = frozenset(found)
        return self._against[rule, tail]

    def _broken_by_bytes(self, rule: Rule, tail: str, begun: bytes) -> set[int]:
        """Tokens that stand for bytes and complete a character that violates a rule after a tail."""
        parts = self._tokenizer.parts
        if rule.wrong(tail) and not rule.wrong(tail, False):  # it has to go on
            right = [c.encode() for c in rule.follows(tail) if not rule.wrong(tail + c, False)]
            return {i for i, more in parts.items() if not any(c.startswith(begun + more) for c in right)}
        found = set()
        for token, more in parts.items() if begun else ():
            with suppress(UnicodeDecodeError):
                if rule.wrong(tail + (begun + more).decode(), False):
                    found.add(token)
        return found

    def broken_by(self, text: str) -> str:
        """The limit that a text violates, in words; "" if it keeps all."""
        for word in self.forbid:
            if word in text:
                return f"says {word}"
        for rule in self.rules:
            if wrong := rule.wrong(text):
                return f"says {wrong}"
        if len(text) < self.least:
            return f"has {len(text)} characters, fewer than {self.least}"
        if self.most and len(text) > self.most:
            return f"has {len(text)} characters, more than {self.most}"
        return ""


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; "" where none ends."""
    found = _SENTENCE.match(text)
    return found[0] if found else ""


@lru_cache(maxsize=8)
def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    """Text of every token that has one by itself, as ASCII bytes have."""
    found = {i: tokenizer.decode([i]) for i in range(tokenizer.code_start)}
    return {i: text for i, text in found.items() if text and (text.isascii() or not tokenizer.is_part(i))}


@lru_cache(maxsize=8)
def _by_length(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Tokens with a text, by its number of characters."""
    found: dict[int, list[int]] = {}
    for token, text in _texts(tokenizer).items():
        found.setdefault(len(text), []).append(token)
    return found


@lru_cache(maxsize=8)
def _by_first(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Tokens with a text, by its first character in plain form."""
    found: dict[str, list[int]] = {}
    for token, text in _texts(tokenizer).items():
        found.setdefault(plain(text[0]), []).append(token)
    return found


@lru_cache(maxsize=8)
def _mattering(tokenizer: Tokenizer, holds: Callable[[str], bool]) -> tuple[int, ...]:
    """Tokens whose text may violate a rule by itself."""
    return tuple(token for token, text in _texts(tokenizer).items() if holds(text))


@lru_cache(maxsize=8)
def _sorted(tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    pairs = sorted((text, token) for token, text in _texts(tokenizer).items())
    return [text for text, _ in pairs], [token for _, token in pairs]


@lru_cache(maxsize=2**16)
def _holding(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """Tokens whose text contains a word."""
    return tuple(token for token, text in _texts(tokenizer).items() if word in text)


@lru_cache(maxsize=4096)
def _starting(tokenizer: Tokenizer, beginning: str) -> tuple[int, ...]:
    """Tokens whose text starts with `mark`."""
    texts, tokens = _sorted(tokenizer)
    first = bisect_left(texts, beginning)
    found = []
    while first < len(texts) and texts[first].startswith(beginning):
        found.append(tokens[first])
        first += 1
    return tuple(found)

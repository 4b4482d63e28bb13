"""What a text must not say, and how long it may be, kept while it is written.

    forbid     words that never occur
    numbers    the only numbers that occur: a run of digits is one of them
    least, most   characters, counted as they are written

As `most` comes near, the text is led to its end: a clause does not end in a comma there, and after a sentence nothing
else begins.

A word or number is told by its characters, however the tokenizer cuts them, into bytes too. A character that is begun
in bytes counts when it is whole: `Limits.broken_by` looks at the whole text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache

from openm6.errors import UsageError
from openm6.sequence import Banned
from openm6.tasks.forms import characters
from openm6.tokenizer import Tokenizer

_NUMBER = re.compile(r"\d+")

_SENTENCE = re.compile(r".*[。！？!?][”』」）)]*", re.DOTALL)
_CLOSERS, _BREAKS = "”』」）)", "，；、,;"

TURN = 4
"""The last quarter of `most` is where a text is led to its end."""


class Limits:
    """A constraint of decoding (sequence.Constraint)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        forbid: Iterable[str] = (),
        numbers: Iterable[str] | None = None,
        least: int = 0,
        most: int = 0,
    ):
        self._tokenizer, self.forbid = tokenizer, tuple(dict.fromkeys(forbid))
        self.numbers = None if numbers is None else frozenset(numbers)
        self.least, self.most = least, most
        if any(not word.strip() for word in self.forbid):
            raise UsageError("A forbidden word is empty.")
        if most and least > most:
            raise UsageError(f"A text of at least {least} and at most {most} characters cannot be.")
        self._reach = max(map(len, self.forbid), default=1) - 1
        self._texts, self._characters = _texts(tokenizer), characters(tokenizer)
        self._always = frozenset(token for word in self.forbid for token in _holding(tokenizer, word))
        self._closers, self._breaks = (
            {token for mark in marks for token in _holding(tokenizer, mark)} for marks in (_CLOSERS, _BREAKS)
        )
        self._rests: dict[str, list[str]] = {}  # of a word that is begun: what is missing
        for word in self.forbid:
            for cut in range(1, len(word)):
                self._rests.setdefault(word[:cut], []).append(word[cut:])

    def next(self, prefix: Sequence[int]) -> Sequence[int]:
        text = self._tokenizer.decode(list(prefix))
        if self.most and len(text) >= self.most:
            return (self._tokenizer.end_id,)
        banned = set(self._always)
        for length in range(1, min(self._reach, len(text)) + 1):
            for rest in self._rests.get(text[-length:], ()):
                banned.update(_starting(self._tokenizer, rest))
        for word in self.forbid:
            if self._spelled(prefix, word):
                banned.add(self._tokenizer.class_ids[word.encode()[-1]])
        if self.most:
            room = self.most - len(text)
            banned.update(i for i, word in self._texts.items() if len(word) > room)
            if room * TURN <= self.most and len(text) >= self.least:
                if text == whole_sentences(text) != "":
                    return (self._tokenizer.end_id, *(i for i in self._closers if i not in banned))
                if not text[-1:].isdigit():  # 1,299 is a number
                    banned |= self._breaks
        if self.numbers is not None:
            banned |= self._wrong_numbers(text)
        if len(text) < self.least:
            banned.add(self._tokenizer.end_id)
        whole = self._characters.next(prefix) if self._characters else Banned()
        if isinstance(whole, Banned):
            return Banned(banned.union(whole))
        return [token for token in whole if token not in banned]

    def _spelled(self, prefix: Sequence[int], word: str) -> bool:
        """Whether the last byte of a word is all that is missing of it, its last character being spelt in bytes."""
        *begun, _ = word[-1].encode()
        if not begun:  # a byte of ASCII has a text
            return False
        ids = [self._tokenizer.class_ids[byte] for byte in begun]
        place = len(prefix) - len(ids)
        return (
            place >= 0
            and list(prefix[place:]) == ids
            and self._tokenizer.decode(list(prefix[:place])).endswith(word[:-1])
        )

    def _wrong_numbers(self, text: str) -> set[int]:
        """Tokens after which no run of digits could become one of the numbers."""
        assert self.numbers is not None
        begun = re.search(r"\d*$", text)
        run = begun[0] if begun else ""
        found: set[int] = set()
        whole = not run or run in self.numbers
        for token, word in self._texts.items():
            joined = run + word
            runs = _NUMBER.findall(joined)
            if not runs:
                continue
            open_end = joined[-1].isdigit()
            wrong = any(one not in self.numbers for one in (runs[:-1] if open_end else runs))
            if not wrong and open_end:
                wrong = not any(number.startswith(runs[-1]) for number in self.numbers)
            if wrong:
                found.add(token)
        if not whole:  # the number goes on: nothing but digits may come, and not the end
            found.update(i for i, word in self._texts.items() if not word[0].isdigit())
            found.add(self._tokenizer.end_id)
        return found

    def broken_by(self, text: str) -> str:
        """Why a text is outside of the limits; "" if it is not."""
        for word in self.forbid:
            if word in text:
                return f"says {word}"
        if self.numbers is not None:
            for number in _NUMBER.findall(text):
                if number not in self.numbers:
                    return f"says {number}, which is not given"
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
    """The text of every token that has one by itself, as the bytes of ASCII have."""
    found = {i: tokenizer.decode([i]) for i in range(tokenizer.code_start)}
    return {i: text for i, text in found.items() if text and (text.isascii() or not tokenizer.is_part(i))}


@lru_cache(maxsize=8)
def _sorted(tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    pairs = sorted((text, token) for token, text in _texts(tokenizer).items())
    return [text for text, _ in pairs], [token for _, token in pairs]


@lru_cache(maxsize=2**16)
def _holding(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """Tokens whose text has a word in it."""
    return tuple(token for token, text in _texts(tokenizer).items() if word in text)


@lru_cache(maxsize=4096)
def _starting(tokenizer: Tokenizer, beginning: str) -> tuple[int, ...]:
    """Tokens whose text starts so."""
    texts, tokens = _sorted(tokenizer)
    first = bisect_left(texts, beginning)
    found = []
    while first < len(texts) and texts[first].startswith(beginning):
        found.append(tokens[first])
        first += 1
    return tuple(found)

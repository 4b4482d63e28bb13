"""Tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from openm6.core.tokenizer import Tokenizer


class Pieces:
    """Text in pieces, token by token: `add` gives what has become certain, `rest` what is left at the end.

    A character can be several tokens, and comes with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self._start = self._told = 0  # the last piece is of the tokens between; what is behind it is read beside it

    def add(self, token: int) -> str:
        self.ids.append(token)
        return "" if self._tokenizer.begun(self.ids) else self._tell(self._new())

    def rest(self) -> str:
        return self._tell(self._new())

    def _new(self) -> str:
        before = self._tokenizer.decode(self.ids[self._start : self._told])
        return self._tokenizer.decode(self.ids[self._start :])[len(before) :]

    def _tell(self, piece: str) -> str:
        self._start, self._told = self._told, len(self.ids)
        return piece


class StopFilter:
    """Pieces of a text up to its first stop string.

    `add` gives the part of the text that is certain to stand before a stop: a possible beginning of a stop is held back
    until the next pieces decide. Once `is_stopped`, nothing follows. `rest` gives what is held back at the end.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.is_stopped = False

    def add(self, piece: str) -> str:
        if self.is_stopped or not self._stops:
            return "" if self.is_stopped else piece
        text = self._held + piece
        before = cut_at_stop(text, self._stops)
        self.is_stopped = len(before) < len(text)
        held = 0 if self.is_stopped else max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return before[: len(text) - held]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings in it; all of it where there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _begun(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins, at most all but its last one."""
    most = min(len(stop) - 1, len(text))
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)

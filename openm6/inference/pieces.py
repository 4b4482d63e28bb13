"""Streaming of text: tokens to pieces of text, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from openm6.core.tokenizer import Tokenizer
from openm6.tasks.chat import ChatFormat

MARK = 16
"""Tokens that the end of a model's reasoning takes, at most."""


class Pieces:
    """Decodes text token by token: `add` returns the text that has become certain, `rest` the remainder at the end.

    A character of several tokens comes with the last of them. With a `chat` format the text begins with reasoning,
    whose pieces `add` leaves in `thought`, returning "".
    """

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat | None = None):
        self._tokenizer, self._chat, self._is_blank = tokenizer, chat, chat is not None
        self.ids: list[int] = []
        self.thought = ""
        self._start = self._stop = 0  # tokens of the last piece, which are decoded again as context of the next one

    def add(self, token: int) -> str:
        self.ids.append(token)
        self.thought = ""
        if self._tokenizer.begun(self.ids):
            return ""
        if self._chat is not None:
            if self._chat.answer_start(self.ids[-MARK:], self._tokenizer) is None:
                self.thought = self._chat.without_marks(self.rest())
                return ""
            self._chat, self._start, self._stop = None, len(self.ids), len(self.ids)
            return ""
        piece = self.rest()
        if self._is_blank:  # between the reasoning and the answer
            piece = piece.lstrip()
            self._is_blank = not piece
        return piece

    def rest(self) -> str:
        context = self._tokenizer.decode(self.ids[self._start : self._stop])
        piece = self._tokenizer.decode(self.ids[self._start :])[len(context) :]
        self._start, self._stop = self._stop, len(self.ids)
        return piece


class StopFilter:
    """Passes the pieces of a text up to its first stop string.

    `add` returns the text that certainly precedes a stop string: a possible beginning of one is held back until later
    pieces decide. Once `is_stopped`, it returns nothing. `rest` returns the text that is held back at the end.
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
    """The text before its first stop string; the whole text if it has none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _begun(text: str, stop: str) -> int:
    """Number of characters at the end of the text that begin the stop string, at most all but its last."""
    most = min(len(stop) - 1, len(text))
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)

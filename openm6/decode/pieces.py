"""Tokens to text as they come."""

from __future__ import annotations

from openm6.tokenizer import Tokenizer


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

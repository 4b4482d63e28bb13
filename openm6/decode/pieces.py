"""Tokens to text as they come."""

from __future__ import annotations

from openm6.tokenizer import Tokenizer


class Pieces:
    """Text in pieces, token by token: `add` gives what has become certain, `rest` what is left at the end.

    A character can be several tokens: what is not yet whole shows as U+FFFD and waits. Whether single bytes are a
    character is known when other text ends their row.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self._text = self._told = ""

    def add(self, token: int) -> str:
        self.ids.append(token)
        self._text = self._tokenizer.decode(self.ids)
        if self._text.endswith("\ufffd") or self._tokenizer.is_part(token):
            return ""
        return self.rest()

    def rest(self) -> str:
        piece, self._told = self._text[len(self._told) :], self._text
        return piece

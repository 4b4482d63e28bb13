"""A constraint to answers of a closed set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_END = -1


class Trie:
    """The allowed answers, each a list of token ids; `end_id` follows a complete one."""

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

"""A least recently used cache with a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key; the least recently used are evicted first."""

    def __init__(self, budget: int):
        self._budget, self._used = budget, 0
        self._known: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: bytes) -> T | None:
        found = self._known.get(key)
        if found is None:
            self.misses += 1
            return None
        self._known.move_to_end(key)
        self.hits += 1
        return found[0]

    def put(self, key: bytes, value: T, size: int) -> None:
        if key in self._known or size > self._budget:
            return
        self._known[key] = value, size
        self._used += size
        while self._used > self._budget:
            _, (_, oldest) = self._known.popitem(last=False)
            self._used -= oldest

    def __len__(self) -> int:
        return len(self._known)

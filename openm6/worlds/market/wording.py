"""Randomness of a generated record: choices determined by its seed, split and number, and wordings of which a fifth
occurs in the test split only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from openm6.data.store import check_split

SPLITS = ("train", "validation", "test")
KEPT_BACK = 5
"""The last of each five wordings is held out for the test split, where half of the records use a held-out one."""

T = TypeVar("T")


class Wording:
    """Random choices for the `number`-th record of a split of a kind of text."""

    def __init__(self, kind: int, split: str, seed: int, number: int):
        check_split("The market has", split, SPLITS)
        self.split = split
        self._rng = np.random.default_rng([seed, SPLITS.index(split), kind, number])

    def one(self, choices: Sequence[T]) -> T:
        """One of the values, with the same distribution in every split."""
        return choices[int(self._rng.integers(len(choices)))]

    def say(self, wordings: Sequence[str], **values: object) -> str:
        """One of at least five wordings, filled with the values."""
        unseen = wordings[KEPT_BACK - 1 :: KEPT_BACK]
        if self.split == "test" and self.chance(0.5):
            chosen = self.one(unseen)
        else:
            chosen = self.one([w for i, w in enumerate(wordings) if i % KEPT_BACK != KEPT_BACK - 1])
        return chosen.format(**values)

    def some(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different values, in random order."""
        return [choices[int(i)] for i in self._rng.permutation(len(choices))[:count]]

    def kept(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different values in their given order."""
        return [choices[i] for i in sorted(self._rng.permutation(len(choices))[:count].tolist())]

    def number(self, low: int, high: int) -> int:
        """A random integer from low to high, both included."""
        return int(self._rng.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self._rng.random() < share)

"""Texts of an invented market, written by code: copy, live sales, passages, tables, reviews, talks, pairs, poems.

A record depends on nothing but view, split, seed and number, and is made when it is asked for. The test split has
combinations that no training record has (of goods: category, colour and material, or category, colour and pattern),
and a fifth of the wordings in which people speak and ask is met there alone.
"""

from __future__ import annotations

from collections.abc import Callable

from openm6.core.errors import UsageError, suggest
from openm6.data.store import Record, check_split
from openm6.worlds.market import copywriting, pairs, poems, reading, tables, talks
from openm6.worlds.market.wording import SPLITS, Wording

VIEWS: dict[str, Callable[[Wording], Record]] = {
    "copy": copywriting.copy, "facts": copywriting.facts, "live": copywriting.live, "passages": reading.passages,
    "knowledge": reading.knowledge, "tables": tables.tables, "reviews": talks.reviews, "talks": talks.talks,
    "entailment": pairs.entailment, "similar": pairs.similar, "poems": poems.poems, "stories": poems.stories,
}  # fmt: skip
RECORDS = {"train": 8_000, "validation": 500, "test": 500}


class Market:
    """The records of a view."""

    def __init__(self, view: str, split: str, seed: int = 0, records: int | None = None):
        self._view, self._split, self._seed = view, split, seed
        self._count = RECORDS[split] if records is None else records
        self.columns = tuple(key for key in self[0] if key != "_where") if self._count else ()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        made = VIEWS[self._view](Wording(list(VIEWS).index(self._view), self._split, self._seed, index))
        return {"_where": f"market:{self._view}/{self._split}#{index}", **made}


def open_market(view: str, split: str = "train", seed: int = 0, records: int | None = None) -> Market:
    """Raises UsageError for an unknown view or split."""
    if view not in VIEWS:
        raise UsageError(f"The market has no part {view!r}.{suggest(view, list(VIEWS))} It has: {', '.join(VIEWS)}.")
    check_split("The market has", split, SPLITS)
    return Market(view, split, seed, records)

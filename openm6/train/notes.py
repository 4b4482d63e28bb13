"""Notes on a run's data, which are logged before its first step."""

from __future__ import annotations

from collections.abc import Iterator

from openm6.data.loader import Entry
from openm6.data.overlap import find_overlap
from openm6.data.source import Source
from openm6.train.recipe import Recipe
from openm6.train.setup import open_section

MOST = 1_000_000
"""Records of a source that are compared with those that are measured on."""


def data_notes(recipe: Recipe, entries: list[Entry]) -> list[str]:
    """Sentences on the classes of each source's labels, and on records that are both trained and measured on;
    `entries` are those of the recipe's data, in their order."""
    classes = [
        f"{entry.name}: {text}"
        for entry in entries
        for slot, found in entry.classes.items()
        for text in found.sentences(slot)
    ]
    return [*classes, *_overlaps(recipe, entries)]


def _overlaps(recipe: Recipe, entries: list[Entry]) -> Iterator[str]:
    """A warning for each source that is measured on, for each one of the same task that is trained on."""
    for measured in recipe.evaluation.data:
        limit = min(measured.limit or recipe.evaluation.limit, recipe.evaluation.limit)
        for section, entry in zip(recipe.data, entries, strict=True):
            if section.task != measured.task or section.stream or not isinstance(entry.records, Source):
                continue
            test = open_section(measured)
            found = find_overlap(entry.task, entry.records, entry.columns, test, measured.columns, limit, MOST)
            if found.found:
                yield (
                    f"Warning: {len(found.found):,} of the {found.total:,} records of {test.name} that are measured on "
                    f"have inputs that are trained on, in {entry.name} (first: {found.first})."
                )

"""Faithfulness of texts to the tables they are written from. Besides references, each metric gets the values of the
table's cells.

    parent       F1 of PARENT (Dhingra et al. 2019, arXiv 1906.01081), 0 to 1: n-grams of the text that the reference
                 or the table entails, and coverage of both; of characters
    facts_kept   fraction of the table's values that occur in the text, word for word
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from openm6.tasks.metrics import Values, characters

WEIGHT = 0.5
"""Weight of the table against the reference in PARENT's recall."""

_SMALL = 1e-5
"""Replacement for an n-gram precision of 0, so that the geometric mean stays above 0."""


def parent(predictions: list[str], references: list[list[str]], tables: list[list[str]]) -> Values:
    """PARENT against the best-fitting reference."""
    rows = zip(predictions, references, tables, strict=True)
    return Values.mean([max(_parent(said, wanted, table) for wanted in some) for said, some, table in rows])


def facts_kept(predictions: list[str], references: list[list[str]], tables: list[list[str]]) -> Values:
    return Values.mean(
        [sum(v in said for v in table) / max(1, len(table)) for said, table in zip(predictions, tables, strict=True)]
    )


def _parent(said: str, wanted: str, table: list[str]) -> float:
    text, reference = characters(said), characters(wanted)
    cells = [characters(value) for value in table]
    known = {token for cell in cells for token in cell}
    if not text:
        return 0.0
    precision = _mean([_entailed_precision(text, reference, known, n) for n in range(1, 5) if len(text) >= n])
    told = _mean([_entailed_recall(text, reference, known, n) for n in range(1, 5) if len(reference) >= n])
    kept = sum(_common(cell, text) / len(cell) for cell in cells if cell) / max(1, len(cells)) if cells else 1.0
    recall = max(told, _SMALL) ** (1 - WEIGHT) * max(kept, _SMALL) ** WEIGHT
    return 2 * precision * recall / (precision + recall)


def _mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(max(v, _SMALL)) for v in values) / len(values)) if values else _SMALL


def _grams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _overlap(gram: tuple[str, ...], known: set[str]) -> float:
    """Probability that the table entails an n-gram: the fraction of its tokens that occur in it."""
    return sum(token in known for token in gram) / len(gram)


def _entailed_precision(text: list[str], reference: list[str], known: set[str], n: int) -> float:
    there, total, borne = _grams(reference, n), 0, 0.0
    for gram, count in _grams(text, n).items():
        shared = min(count, there[gram])
        borne += shared + (count - shared) * _overlap(gram, known)
        total += count
    return borne / total


def _entailed_recall(text: list[str], reference: list[str], known: set[str], n: int) -> float:
    """Recall of the reference's n-grams, weighted by the probability that the table entails them."""
    there, total, told = _grams(text, n), 0.0, 0.0
    for gram, count in _grams(reference, n).items():
        weight = _overlap(gram, known)
        told += weight * min(count, there[gram])
        total += weight * count
    return told / total if total else 1.0


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if token == other else max(row[place], row[place - 1])
    return row[-1]


FAITHFUL: dict[str, Callable[[list[str], list[list[str]], list[list[str]]], Values]] = {
    "parent": parent, "facts_kept": facts_kept,
}  # fmt: skip

"""Label tasks: precision, recall and F1 by label, confusion matrix, references outside the label set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from openm6.core.errors import cut
from openm6.tasks.metrics import label_namer, label_pairs
from openm6.tasks.slots.label import normalize_label

_NAMED = 5
"""Number of unknown references that a note names."""


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """Figures of a label task.

    by_label    {label: {"precision", "recall", "f1", "records": number of references}} of all labels that occur
    confusion   number of records by (reference, answer)
    """

    by_label: dict[str, dict[str, float]]
    confusion: Counter[tuple[str, str]]

    @classmethod
    def of(cls, answers: list[str], references: list[list[str]], known: Sequence[str]) -> LabelFigures:
        """`known`: the task's labels, listed first and in their order."""
        said, right = label_pairs(answers, references, known)
        there = {*said, *right}
        names = [name for name in dict.fromkeys((*known, *right, *said)) if name in there]
        confusion, answered, wanted = Counter(zip(right, said, strict=True)), Counter(said), Counter(right)
        by_label = {}
        for name in names:
            hits, given, records = confusion[name, name], answered[name], wanted[name]
            by_label[name] = {
                "precision": hits / given if given else 0.0, "recall": hits / records if records else 0.0,
                "f1": 2 * hits / (given + records), "records": records,
            }  # fmt: skip
        return cls(by_label, confusion)

    def to_dict(self) -> dict[str, Any]:
        """`by_label`, and `confusion` as {reference: {answer: records}} without zeros."""
        confusion: dict[str, dict[str, int]] = {}
        for (right, said), count in sorted(self.confusion.items()):
            confusion.setdefault(right, {})[said] = count
        return {"by_label": self.by_label, "confusion": confusion}

    def tables(self, matrix: int, rows: int) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, columns, rows) of at most `rows` rows: the figures of the most frequent labels, then the confusion
        matrix of up to `matrix` labels, else the most frequent confusions."""
        chosen = list(self.by_label)
        if len(chosen) > rows:
            chosen = sorted(chosen, key=lambda name: -self.by_label[name]["records"])[:rows]
        figures = [
            [_short(n), *(f"{self.by_label[n][key]:.3f}" for key in ("precision", "recall", "f1")),
             f"{self.by_label[n]['records']:.0f}"]
            for n in chosen
        ]  # fmt: skip
        title = "by label" + _of(len(chosen), len(self.by_label), "the most frequent")
        yield title, ["label", "precision", "recall", "F1", "records"], figures
        if len(self.by_label) <= matrix:
            header = ["right ↓  answered →", *map(_short, chosen)]
            yield (
                "confusion matrix",
                header,
                [[_short(right), *(str(self.confusion[right, said]) for said in chosen)] for right in chosen],
            )
            return
        wrong = [(pair, count) for pair, count in self.confusion.most_common() if pair[0] != pair[1]]
        shown = [[_short(right), _short(said), str(count)] for (right, said), count in wrong[:rows]]
        if shown:
            title = "confusions" + _of(len(shown), len(wrong), "the most frequent")
            yield title, ["right", "answered", "records"], shown


def unknown_references(references: list[list[str]], known: Sequence[str], task: str) -> str:
    """A note that names references outside the labels of a task, "" if every record has one inside."""
    name, inside = label_namer(known), {*map(normalize_label, known)}
    wrong = Counter(name(wanted[0]) for wanted in references if inside.isdisjoint(map(name, wanted)))
    if not wrong:
        return ""
    named = [f'"{_short(text)}" {count}{_nearest(text, known)}' for text, count in wrong.most_common(_NAMED)]
    more = f" and {len(wrong) - _NAMED} others" if len(wrong) > _NAMED else ""
    labels = ", ".join(map(_short, known[:10])) + (f" and {len(known) - 10} others" if len(known) > 10 else "")
    return (
        f"{wrong.total()} of {len(references)} references are not labels of the task {task} ({labels}), so that no "
        f"answer can be right: {', '.join(named)}{more}. Correct the data's labels, or choose their column with -c."
    )


def _nearest(text: str, known: Sequence[str]) -> str:
    close = get_close_matches(text, known, n=1)
    return f" (nearest: {_short(close[0])})" if close else ""


def _of(shown: int, every: int, which: str) -> str:
    return f" ({which} {shown} of {every})" if shown < every else ""


def _short(text: str) -> str:
    return cut(text) or "(empty)"

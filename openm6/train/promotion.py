"""The promotion test of a newly trained version: it is measured on data that it was not trained on, and has to be
better than the current one by more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from openm6.core.errors import UsageError
from openm6.data.overlap import count_overlap, find_overlap
from openm6.data.source import Source, open_source
from openm6.data.store import ListRecords
from openm6.tasks.task import Task

SIGNIFICANCE = 0.05
"""Level of the exact McNemar test on the held-out answers."""
WORSE = 0.01
"""Largest loss of accuracy on the calibration records with which a version is still promoted."""


def check_apart(task: Task, calibration: Source, columns: Mapping[str, str], names: Iterable[str]) -> None:
    """Refuse to train on records that the versions are measured on. `names`: sources that are to be trained on;
    `columns`: of the calibration's records. Raises UsageError that counts the records they have in common."""
    for name in names:
        common = count_overlap(task, open_source(name), {}, calibration, columns)
        if common.found:
            raise UsageError(
                f"{name} has {common.found} of the {common.total} records that {task.name} was calibrated with, the "
                f"first at {common.first}: a version that was trained on them cannot be measured on them. Give other "
                "records by --data, or calibrate with others first."
            )


def not_trained_on(task: Task, held_out: ListRecords, names: Iterable[str]) -> ListRecords:
    """The held-out records that no source of `names`, which is trained on, has too."""
    if not len(held_out):
        return held_out
    known = Source("kept", held_out)
    seen = {number for name in names for number in find_overlap(task, open_source(name), {}, known, {})}
    return ListRecords(record for number, record in enumerate(known) if number not in seen)


def gain(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Compare how right two versions are on the same answers, both [n], 0 to 1.

    Returns how many answers are `improved` and `worsened`, and `chance`: the probability of at least so many improved
    ones if both versions were equally good (exact McNemar test, one-sided).
    """
    improved, worsened = int((after > before).sum()), int((after < before).sum())
    changed = improved + worsened
    chance = sum(math.comb(changed, k) for k in range(improved, changed + 1)) / 2**changed
    return {"improved": improved, "worsened": worsened, "chance": chance}


def reason_against(found: Mapping[str, Any]) -> str:
    """Why a version is not promoted, as a sentence; "" where it is. `found`: the figures (compress/cascade.py)."""
    for task, told in found["tasks"].items():
        if "before" in told and told["before"] - told["after"] > WORSE + 1e-9:
            return (
                f"It has {told['before'] - told['after']:.1%} fewer of the calibration's records of {task} right; "
                f"{WORSE:.0%} is allowed."
            )
    count = sum(told.get("held_out", 0) for told in found["tasks"].values())
    if found["chance"] <= SIGNIFICANCE:
        return ""
    return (
        f"Of {count} answers that were held out {found['improved']} are better and {found['worsened']} worse, which "
        f"may be chance (p = {found['chance']:.2f} by McNemar's exact test; {SIGNIFICANCE} is allowed). The more "
        "answers are kept, the smaller a gain can be shown."
    )


def told_counts(counts: Mapping[str, int]) -> str:
    """Answers that were passed over, as a text: "3 without an answer, 2 in the calibration"."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())

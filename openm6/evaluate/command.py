"""From the names a user gives (task, data, columns) to an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openm6.bundle import Bundle
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.evaluate.measure import Evaluation, evaluate
from openm6.evaluate.retrieval import evaluate_retrieval


def measure(
    bundle: Bundle,
    task: str,
    data: str,
    columns: Mapping[str, str] | None = None,
    data_format: str | None = None,
    images: str | None = None,
    limit: int | None = None,
    decoding: Mapping[str, Any] | None = None,
    where: Mapping[str, str] | None = None,
    answers: bool = True,
) -> Evaluation:
    """Open `data`, map its columns to the task's slots and measure on its first `limit` records (`answers`: evaluate).

    `where` keeps only records whose columns have these values, e.g. {"kind": "colour"}.
    """
    chosen = bundle.task(task)
    records = open_source(data, data_format, images)
    view = SlotView.of(chosen, records, columns or {})
    kept = (view(r) for r in records if all(str(r.get(k)) == v for k, v in (where or {}).items()))
    if limit is not None:
        kept = (record for record, _ in zip(kept, range(limit), strict=False))
    return evaluate(bundle, chosen, kept, data, decoding=decoding, answers=answers)


def measure_retrieval(
    bundle: Bundle,
    task: str,
    against: str,
    data: str,
    columns: Mapping[str, str] | None = None,
    against_columns: Mapping[str, str] | None = None,
    same: Sequence[str] = (),
    data_format: str | None = None,
    images: str | None = None,
    limit: int | None = None,
    dims: int | None = None,
) -> Evaluation:
    """Let the vector that `task` gives of each record find the one that `against` gives of it among those of all.

    Records that agree in the columns `same` are right for each other.
    """
    records = open_source(data, data_format, images, limit=limit)
    first, second = bundle.task(task), bundle.task(against)
    views = SlotView.of(first, records, columns or {}), SlotView.of(second, records, against_columns or {})
    groups = ["|".join(str(record.get(name)) for name in same) for record in records] if same else None
    return evaluate_retrieval(
        bundle, first, second, [views[0](r) for r in records], [views[1](r) for r in records], groups, data, dims=dims
    )

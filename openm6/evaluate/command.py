"""From the names a user gives (task, data, columns) to an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openm6.bundle import Bundle
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.evaluate.measure import Evaluation, evaluate


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

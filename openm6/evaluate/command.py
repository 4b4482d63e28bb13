"""Evaluations by the names of task, data and columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openm6.core.errors import DataError, UsageError
from openm6.data.columns import SlotView
from openm6.data.rejects import Reject
from openm6.data.source import open_source
from openm6.evaluate.measure import Evaluation, evaluate
from openm6.evaluate.retrieval import evaluate_retrieval
from openm6.inference.session import Session
from openm6.tasks.task import Task


def measure(
    session: Session,
    task: str | Task,
    data: str,
    columns: Mapping[str, str] | None = None,
    data_format: str | None = None,
    images: str | None = None,
    limit: int | None = None,
    decoding: Mapping[str, Any] | None = None,
    where: Mapping[str, str] | None = None,
    answers: bool = True,
    shots: int = 0,
    shots_from: str = "",
    metrics: Sequence[str] = (),
    spread: bool = False,
    truncate: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Open `data`, map its columns to the task's slots and evaluate the first `limit` records, or with `spread` `limit`
    records evenly spaced (a file may be ordered by label). `answers`, `metrics`, `truncate`, `on_progress`: see
    `evaluate`. Unreadable rows count as rejected.

    `where`: keep only records with these column values, e.g. {"kind": "colour"}. `shots`: number of few-shot examples
    before every record, the same ones, drawn from the source `shots_from`.
    """
    chosen = session.task(task)
    records = open_source(data, data_format, images)
    view = SlotView.of(chosen, records, columns or {})
    examples = _shots(chosen, shots, shots_from, columns, data_format, images) if shots else []

    def rows() -> Iterator[Mapping[str, Any] | Reject]:
        left = math.inf if limit is None else limit
        places = range(limit) if spread and limit and limit < len(records) else ()
        for row in (records[place * len(records) // len(places)] for place in places) if places else records.rows():
            if left == 0:
                return
            if isinstance(row, Reject):
                yield row
            elif all(str(row.get(key)) == value for key, value in (where or {}).items()):
                left -= 1
                try:
                    yield view(row)
                except DataError as error:
                    yield Reject(str(row.get("_where", "")), str(error))

    return evaluate(
        session, chosen, rows(), data, examples=examples, decoding=decoding, answers=answers, metrics=metrics,
        truncate=truncate, on_progress=on_progress,
    )  # fmt: skip


def _shots(
    task: Task, count: int, source: str, columns: Mapping[str, str] | None, data_format: str | None, images: str | None
) -> list[Mapping[str, Any]]:
    """`count` random records of a source, the same at every call."""
    if not source:
        raise UsageError("shots needs shots_from: data, other than the evaluation data, to draw the examples from.")
    records = open_source(source, data_format, images)
    if count > len(records):
        raise UsageError(f"{source} has {len(records)} records, too few for {count} examples.")
    view = SlotView.of(task, records, columns or {})
    chosen = np.random.default_rng(0).permutation(len(records))[:count]
    return [view(records[int(number)]) for number in chosen]


def measure_retrieval(
    session: Session,
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
    among_negatives: bool = False,
    truncate: str | None = None,
) -> Evaluation:
    """Evaluate retrieval: the vector of `task` of each record is the query, those of `against` of all records the keys.

    Keys of records with equal values in the columns `same` are relevant too. With `among_negatives` the key is ranked
    only among the record's own `negatives`.
    """
    records = open_source(data, data_format, images, limit=limit)
    first, second = session.task(task), session.task(against)
    views = SlotView.of(first, records, columns or {}), SlotView.of(second, records, against_columns or {})
    groups = ["|".join(str(record.get(name)) for name in same) for record in records] if same else None
    others = None
    if among_negatives:
        rooted = ([{"_root": r.get("_root", ""), **one} for one in r.get("negatives") or ()] for r in records)
        others = [[views[1](one) for one in some] for some in rooted]
    return evaluate_retrieval(
        session, first, second, [views[0](r) for r in records], [views[1](r) for r in records], groups, data, dims=dims,
        others=others, truncate=truncate,
    )  # fmt: skip

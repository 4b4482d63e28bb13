"""Evaluations by the names of task, data and columns; retrieval, by the metrics of `openm6.retrieve.ranks`."""

from __future__ import annotations

import math
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.data.columns import SlotView
from openm6.data.rejects import Reject
from openm6.data.source import open_source
from openm6.evaluate.measure import Case, Evaluation, evaluate, too_long
from openm6.inference.modes import mode_of
from openm6.inference.session import Session
from openm6.retrieve.ranks import rank_scores, scores_of_ranks
from openm6.tasks.metrics import Score
from openm6.tasks.record import Record
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


def evaluate_retrieval(
    session: Session,
    task: Task,
    against: Task,
    queries: Sequence[Record],
    keys: Sequence[Record],
    groups: Sequence[str] | None = None,
    source: str = "",
    *,
    dims: int | None = None,
    others: Sequence[Sequence[Record]] | None = None,
    truncate: str | None = None,
) -> Evaluation:
    """Rank the keys for every query: relevant are key i and the keys of its group; with `others` key i is ranked only
    among these records of its own. Pairs with an invalid record are counted as rejected. `truncate`: see Session.run.
    """
    started = time.perf_counter()
    for one in (task, against):
        if mode_of(one).result != "vector":
            raise UsageError(f"The task {one.name} gives no vector: retrieval needs two tasks with vectors.")
    if not queries:
        raise DataError(f"Nothing to evaluate in {source or 'the data'}: there are no records.")
    session.model.eval()

    def read(one: Task, records: Sequence[Record]) -> list[Any]:
        return list(session.vectors(one, records, dims=dims, on_error="return", truncate=truncate))

    pairs = list(zip(read(task, queries), read(against, keys), strict=True))
    wrong = [next((one for one in pair if isinstance(one, DataError)), None) for pair in pairs]
    good = [number for number, error in enumerate(wrong) if error is None]
    rejects, long = [], list[str]()
    for number, error in enumerate(wrong):
        if error is not None:
            where = str(queries[number].get("_where", f"record {number}"))
            rejects.append((bisect(good, number), Reject(where, str(error))))
            long += [where] * isinstance(error, ContextLengthError)
    if not good:
        raise DataError(f"Nothing to evaluate in {source or 'the data'}: {rejects[-1][1].reason}")
    notes = [too_long(long, len(queries), session.processor.max_length)] if long else []
    asked, found = (np.stack(side) for side in zip(*(pairs[number] for number in good), strict=True))
    queries = [queries[number] for number in good]
    groups = None if groups is None else [groups[number] for number in good]
    if others is not None:
        others = [others[number] for number in good]
        if not all(others):
            raise DataError(f"A record of {source or 'the data'} has no negatives.")
        flat = np.stack(
            list(session.vectors(against, [one for some in others for one in some], dims=dims, truncate=truncate))
        )
        scores = _among(asked, found, np.split(flat, np.cumsum([len(some) for some in others])[:-1]))
    else:
        owners = np.arange(len(queries)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
        scores = rank_scores(asked @ found.T, owners[:, None] == owners)
    cases = [Case(record, "", []) for record in queries]
    seconds = time.perf_counter() - started
    return Evaluation(f"{task.name} {against.name}", source, scores, cases, seconds, rejects, notes=notes)


def _among(asked: np.ndarray, found: np.ndarray, others: Sequence[np.ndarray]) -> dict[str, Score]:
    near = (asked * found).sum(1)
    ranks = [int((wrong @ query >= right).sum()) for query, right, wrong in zip(asked, near, others, strict=True)]
    return scores_of_ranks(np.array(ranks))

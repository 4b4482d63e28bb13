"""Evaluation of retrieval between two tasks with vectors, by the metrics of `openm6.retrieve.ranks`."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.data.rejects import Reject
from openm6.evaluate.measure import Case, Evaluation, too_long
from openm6.inference.session import Session
from openm6.retrieve.ranks import rank_scores, scores_of_ranks
from openm6.tasks.metrics import Score
from openm6.tasks.task import Task

Record = Mapping[str, Any]


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
        if not one.embeds:
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

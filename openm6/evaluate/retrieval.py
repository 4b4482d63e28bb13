"""Do vectors find what belongs to them? The metrics are those of `openm6.retrieve.ranks`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openm6.bundle import Bundle
from openm6.errors import DataError, UsageError
from openm6.evaluate.measure import Case, Evaluation
from openm6.retrieve.ranks import rank_scores, scores_of_ranks
from openm6.tasks.metrics import Score
from openm6.tasks.task import Task

Record = Mapping[str, Any]


def evaluate_retrieval(
    bundle: Bundle,
    task: Task,
    against: Task,
    queries: Sequence[Record],
    keys: Sequence[Record],
    groups: Sequence[str] | None = None,
    source: str = "",
    *,
    dims: int | None = None,
    others: Sequence[Sequence[Record]] | None = None,
) -> Evaluation:
    """Query i is answered by key i, and by all keys of its group; with `others` by key i alone, among key i and these
    others of its own."""
    started = time.perf_counter()
    for one in (task, against):
        if not one.embeds:
            raise UsageError(f"The task {one.name} gives no vector: retrieval is measured between two that do.")
    if not queries:
        raise DataError(f"Nothing to evaluate in {source or 'the data'}: there are no records.")
    bundle.model.eval()
    asked = np.stack(list(bundle.vectors(task, queries, dims=dims)))
    found = np.stack(list(bundle.vectors(against, keys, dims=dims)))
    if others is not None:
        if not all(others):
            raise DataError(f"A record of {source or 'the data'} has no negatives to choose among.")
        flat = np.stack(list(bundle.vectors(against, [one for some in others for one in some], dims=dims)))
        scores = _among(asked, found, np.split(flat, np.cumsum([len(some) for some in others])[:-1]))
    else:
        owners = np.arange(len(queries)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
        scores = rank_scores(asked @ found.T, owners[:, None] == owners)
    cases = [Case(record, "", []) for record in queries]
    return Evaluation(f"{task.name} {against.name}", source, scores, cases, time.perf_counter() - started)


def _among(asked: np.ndarray, found: np.ndarray, others: Sequence[np.ndarray]) -> dict[str, Score]:
    near = (asked * found).sum(1)
    ranks = [int((wrong @ query >= right).sum()) for query, right, wrong in zip(asked, near, others, strict=True)]
    return scores_of_ranks(np.array(ranks))

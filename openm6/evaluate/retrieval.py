"""Do vectors find what belongs to them?

recall@k   share of the queries with something right among the first k
mrr        mean of 1 / the rank of the first that is right
ndcg@10    discounted gains of all that is right among the first ten, over those of the best order
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openm6.bundle import Bundle
from openm6.errors import DataError, UsageError
from openm6.evaluate.measure import Case, Evaluation
from openm6.tasks.metrics import Score, Values, score_of
from openm6.tasks.task import Task

Record = Mapping[str, Any]

RANKS = (1, 5, 10)


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
) -> Evaluation:
    """Query i is answered by key i, and by all keys of its group."""
    started = time.perf_counter()
    for one in (task, against):
        if not one.embeds:
            raise UsageError(f"The task {one.name} gives no vector: retrieval is measured between two that do.")
    if not queries:
        raise DataError(f"Nothing to evaluate in {source or 'the data'}: there are no records.")
    bundle.model.eval()
    asked = np.stack(list(bundle.vectors(task, queries, dims=dims)))
    found = np.stack(list(bundle.vectors(against, keys, dims=dims)))
    owners = np.arange(len(queries)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    scores = rank_scores(asked @ found.T, owners[:, None] == owners)
    cases = [Case(record, "", []) for record in queries]
    return Evaluation(f"{task.name} {against.name}", source, scores, cases, time.perf_counter() - started)


def rank_scores(likeness: np.ndarray, right: np.ndarray) -> dict[str, Score]:
    """Of queries [N, M] how near each key is, and bool [N, M] which are right (at least one a query). Of equally near
    ones the wrong come first."""
    order = np.lexsort((right, -likeness), axis=-1)
    hits = np.take_along_axis(right, order, -1)
    first = hits.argmax(-1)
    gains = 1 / np.log2(np.arange(10) + 2)
    best = np.cumsum(gains)[np.minimum(right.sum(-1), 10) - 1]
    top = hits[:, :10]
    values = {
        **{f"recall@{k}": (first < k).astype(float) for k in RANKS},
        "mrr": 1 / (first + 1.0),
        "ndcg@10": top @ gains[: top.shape[1]] / best,
    }
    return {name: score_of(Values.mean(examples.tolist())) for name, examples in values.items()}

"""Ranking metrics.

recall@k   fraction of the queries with a relevant key among the first k
mrr        mean reciprocal rank of the first relevant key
ndcg@10    discounted cumulative gain of the first ten, normalized by the ideal order
"""

from __future__ import annotations

import numpy as np

from openm6.tasks.metrics import Score, Values, score_of

RANKS = (1, 5, 10)


def rank_scores(likeness: np.ndarray, right: np.ndarray) -> dict[str, Score]:
    """Recall, MRR and NDCG of N queries among M keys. `likeness` [N, M]: similarity; `right`, bool [N, M]: relevance,
    at least one key per query. Ties count against the relevant keys."""
    order = np.lexsort((right, -likeness), axis=-1)
    hits = np.take_along_axis(right, order, -1)
    first = hits.argmax(-1)
    gains = 1 / np.log2(np.arange(10) + 2)
    best = np.cumsum(gains)[np.minimum(right.sum(-1), 10) - 1]
    top = hits[:, :10]
    return scores_of_ranks(first, top @ gains[: top.shape[1]] / best)


def scores_of_ranks(first: np.ndarray, gained: np.ndarray | None = None) -> dict[str, Score]:
    """Recall, MRR and NDCG by the rank, from 0, of the `first` relevant key of each query [N]. `gained` [N]: NDCG@10 if
    a query can have several relevant keys."""
    if gained is None:
        gained = np.where(first < 10, 1 / np.log2(first + 2.0), 0.0)
    values = {
        **{f"recall@{k}": (first < k).astype(float) for k in RANKS}, "mrr": 1 / (first + 1.0), "ndcg@10": gained,
    }  # fmt: skip
    return {name: score_of(Values.mean(examples.tolist())) for name, examples in values.items()}

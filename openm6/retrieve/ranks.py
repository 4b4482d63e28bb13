"""How well a list puts what is right in front.

recall@k   share of the queries with something right among the first k
mrr        mean of 1 / the rank of the first that is right
ndcg@10    discounted gains of all that is right among the first ten, over those of the best order
"""

from __future__ import annotations

import numpy as np

from openm6.tasks.metrics import Score, Values, score_of

RANKS = (1, 5, 10)


def rank_scores(likeness: np.ndarray, right: np.ndarray) -> dict[str, Score]:
    """Recall, MRR and NDCG of N queries among M keys. `likeness` [N, M]: how near each key is; `right`, bool [N, M]:
    which keys are right (at least one a query). Of equally near ones the wrong come first."""
    order = np.lexsort((right, -likeness), axis=-1)
    hits = np.take_along_axis(right, order, -1)
    first = hits.argmax(-1)
    gains = 1 / np.log2(np.arange(10) + 2)
    best = np.cumsum(gains)[np.minimum(right.sum(-1), 10) - 1]
    top = hits[:, :10]
    return scores_of_ranks(first, top @ gains[: top.shape[1]] / best)


def scores_of_ranks(first: np.ndarray, gained: np.ndarray | None = None) -> dict[str, Score]:
    """Recall, MRR and NDCG by the place, from 0, of the `first` right key of each query. `gained`: the NDCG@10 of each,
    where more than one key is right."""
    if gained is None:
        gained = np.where(first < 10, 1 / np.log2(first + 2.0), 0.0)
    values = {
        **{f"recall@{k}": (first < k).astype(float) for k in RANKS}, "mrr": 1 / (first + 1.0), "ndcg@10": gained,
    }  # fmt: skip
    return {name: score_of(Values.mean(examples.tolist())) for name, examples in values.items()}

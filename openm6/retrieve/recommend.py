"""A recommender in two stages: what is near to what a customer bought is recalled from an index, and ranked by a model
of boosted trees (LightGBM) that sees nearness, how much is sold, the items' columns and the occasion.

    DIR/recommender.json    the index, the columns, how often each item was bought
    DIR/ranker.txt          the trees, as LightGBM writes them

A visit is a record: history (ids, the oldest first), bought (an id), shown (ids, if it is known what else was offered),
and columns of context such as the season.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openm6.atomic import require_new, write_whole
from openm6.data.columns import require_columns
from openm6.data.source import Source
from openm6.errors import DataError, UsageError, suggest
from openm6.retrieve.index import Index
from openm6.retrieve.ranks import scores_of_ranks
from openm6.tasks.metrics import Score, Values, score_of

NEAREST, LIKED, POPULAR = 150, 100, 50
"""Candidates for ranking: what is nearest to the history; the most bought of what is near; the most bought of all."""
WIDE = 10
"""What is near: so many times as many as the nearest that are taken."""
RECALLED = NEAREST + LIKED + POPULAR
DECAY = 0.8
"""Weight of an item of the history against the next one, in the customer's vector."""
NEGATIVES = 30
"""Of a visit's candidates, to learn ranking from."""
MOST, CHUNK = 50, 64
"""Of a history only so many last items count; visits that are looked up at once."""

_TREES = {
    "objective": "lambdarank", "learning_rate": 0.05, "num_leaves": 15, "min_data_in_leaf": 50, "verbosity": -1,
    "lambdarank_truncation_level": 20, "feature_fraction": 0.8, "bagging_fraction": 0.8, "bagging_freq": 1,
    "deterministic": True, "force_row_wise": True,
}  # fmt: skip
_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Recommendation:
    id: str
    score: float


class Recommender:
    """`Recommender.fit` or `Recommender.load`; `recommend`, `measure`, `save`."""

    def __init__(self, index: Index, context: Mapping[str, list[str] | None], bought: Mapping[str, int], ranker: Any):
        """`context`: column to its values, None where it is a number; `bought`: how often each id was."""
        items = index.items(list(index.about["columns"]))
        self.index, self.context, self._ranker = index, dict(context), ranker
        self._ids, self._vectors = items.ids, items.vectors
        self._place = {name: place for place, name in enumerate(items.ids)}
        self._bought = np.array([bought.get(name, 0) for name in items.ids], float)
        self._texts: dict[str, np.ndarray] = {}
        self._numbers: dict[str, np.ndarray] = {}
        for name, kind in index.about["columns"].items():
            if kind in ("int64", "float64"):
                values = [np.nan if v is None else float(v) for v in items.columns[name]]
                self._numbers[name] = np.sign(values) * np.log1p(np.abs(values))
            else:
                self._texts[name] = np.array([str(v) for v in items.columns[name]], object)
        # In an order of its own: codes have to be the same whatever order the index is read in.
        self._codes = {
            name: np.unique(np.concatenate((values, context.get(name) or [])), return_inverse=True)[1][: len(values)]
            for name, values in self._texts.items()
        }

    # Learning

    @classmethod
    def fit(cls, index: Index, visits: Source, context: Sequence[str] = (), seed: int = 0) -> Recommender:
        """Learn to rank from visits. Raises UsageError for columns that are not there, DataError where no visit can be
        used."""
        records = _checked(visits, context)
        values: dict[str, list[str] | None] = {}
        for name in context:
            found = [record.get(name) for record in records]
            numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found if v is not None)
            values[name] = None if numeric else sorted({str(v) for v in found})
        bought = Counter(name for record in records for name in [*record["history"], record["bought"]])
        made = cls(index, values, bought, None)
        records = [record for record in records if record["bought"] in made._place]
        if not records:
            raise DataError(f"{visits.name}: nothing that was bought is in the index {index.path}.")
        made._learn(records, seed)
        return made

    def _learn(self, records: list[dict[str, Any]], seed: int) -> None:
        import lightgbm

        rng = np.random.default_rng(seed)
        rows, labels, groups = [], [], []
        for record, candidates in zip(records, self._candidates(records), strict=True):
            right = self._place[record["bought"]]
            # Where recall does not bring it there is nothing to learn for ranking: it would teach that what is near
            # is wrong. What else was shown is a lesson of its own.
            offered = [self._place[name] for name in record.get("shown") or [] if name in self._place]
            for others in (candidates if right in candidates else [], offered):
                wrong = np.array([place for place in others if place != right], int)
                if not len(wrong):
                    continue
                wrong = rng.choice(wrong, min(NEGATIVES, len(wrong)), replace=False)
                rows.append(self._features(record, np.concatenate(([right], wrong)), without=right))
                labels += [1] + [0] * len(wrong)
                groups.append(1 + len(wrong))
        if not rows:
            raise DataError("Of no visit is what was bought among what is recalled or shown: nothing can be learned.")
        data = lightgbm.Dataset(
            np.concatenate(rows), label=labels, group=groups, feature_name=self.features,
            categorical_feature=[name for name in self.features if name.startswith(("is ", "at "))],
        )  # fmt: skip
        self._ranker = lightgbm.train({**_TREES, "seed": seed}, data, _ROUNDS)

    # Finding

    def recommend(
        self, history: Sequence[str], context: Mapping[str, Any] | None = None, k: int = 10
    ) -> list[Recommendation]:
        """The k items that the ranker puts first, the best first, none of the history; fewer where there are not so
        many. Ids that the index has not are passed over; an empty history gives what is most bought, ranked by the
        occasion. Raises UsageError for an unknown column of context or value."""
        if k < 1:
            raise UsageError(f"k is {k}; ask for 1 or more.")
        given = dict(context or {})
        for name, value in given.items():
            if name not in self.context:
                known = ", ".join(self.context) or "none"
                raise UsageError(f"There is no context {name!r}.{suggest(name, list(self.context))} Known: {known}.")
            known_values = self.context[name]
            if known_values is not None and str(value) not in known_values:
                raise UsageError(f"{name} is one of {', '.join(known_values)}, not {value!r}.")
        visit = {**given, "history": list(history)}
        places = next(iter(self._candidates([visit], -(-k // RECALLED))))
        scores = self._scores(visit, places)
        order = np.argsort(-scores, kind="stable")[:k]
        return [Recommendation(str(self._ids[places[i]]), float(scores[i])) for i in order]

    def _known(self, visit: Mapping[str, Any]) -> list[int]:
        return [self._place[name] for name in visit["history"] if name in self._place][-MOST:]

    def _candidates(self, visits: Sequence[Mapping[str, Any]], times: int = 1) -> Iterator[np.ndarray]:
        """Of each visit the places of RECALLED items, or `times` as many, none of the history: the nearest to any of
        the history or to all of it, the most bought of what is near, and the most bought. Fewer where there are not so
        many."""
        nearest, liked, total = NEAREST * times, LIKED * times, RECALLED * times
        popular = np.argsort(-self._bought, kind="stable")[: total + MOST]
        for some in (visits[i : i + CHUNK] for i in range(0, len(visits), CHUNK)):
            histories = [self._known(visit) for visit in some]
            asked = [np.concatenate((self._vectors[h], self._customer(h)[None])) for h in histories if h]
            found = self.index.nearest(np.concatenate(asked), nearest * WIDE) if asked else (np.zeros((0, 0)),) * 2
            row = 0
            for history in histories:
                near = np.zeros(0, int)
                if history:
                    scores, ids = (part[row : row + len(history) + 1].ravel() for part in found)
                    row += len(history) + 1
                    places = np.array([self._place.get(name, -1) for name in ids[np.argsort(-scores, kind="stable")]])
                    places = places[np.sort(np.unique(places, return_index=True)[1])]
                    near = places[(places >= 0) & ~np.isin(places, history)][: nearest * WIDE]
                rest = near[nearest:]
                rest = rest[np.argsort(-self._bought[rest], kind="stable")[:liked]]
                chosen = np.concatenate((near[:nearest], rest)).astype(int)
                more = popular[~np.isin(popular, [*history, *chosen])]
                yield np.concatenate((chosen, more[: total - len(chosen)]))

    def _customer(self, history: Sequence[int]) -> np.ndarray:
        """The mean of the items' vectors, the last ones weighing most."""
        weights = DECAY ** np.arange(len(history))[::-1]
        vector = weights @ self._vectors[list(history)]
        return np.asarray(vector / max(np.linalg.norm(vector), 1e-9), np.float32)

    # What the ranker sees

    @property
    def features(self) -> list[str]:
        same = [f"{name} as asked" for name in self._texts if self.context.get(name) is not None]
        return [
            "near all", "nearest", "near the last", "bought",
            *(f"{part} {name}" for name in self._texts for part in ("is", "share of")),
            *(f"{part} {name}" for name in self._numbers for part in ("has", "above")),
            *(f"{'of' if values is None else 'at'} {name}" for name, values in self.context.items()), *same,
        ]  # fmt: skip

    def _features(self, visit: Mapping[str, Any], places: np.ndarray, without: int = -1) -> np.ndarray:
        """[places, features]; of `without` one purchase is taken off, the visit's own. Unknown values are NaN."""
        history = self._known(visit)
        none = np.full(len(places), np.nan)
        columns: list[np.ndarray] = [none, none, none]
        if history:
            near = self._vectors[places] @ self._vectors[history].T
            columns = [self._vectors[places] @ self._customer(history), near.max(1), near[:, -1]]
        columns.append(np.log1p(np.maximum(0, self._bought[places] - (places == without))))
        for name in self._texts:
            codes = self._codes[name]
            columns.append(codes[places].astype(float))
            columns.append((codes[places][:, None] == codes[history]).mean(1) if history else none)
        for numbers in self._numbers.values():
            columns.append(numbers[places])
            columns.append(numbers[places] - np.nanmean(numbers[history]) if history else none)
        for name, values in self.context.items():
            value = visit.get(name)
            told = np.nan
            if value is not None and values is None:
                told = float(value)
            elif values is not None and str(value) in values:
                told = values.index(str(value))
            columns.append(np.full(len(places), told))
        for name, texts in self._texts.items():
            if self.context.get(name) is not None:
                columns.append((texts[places] == str(visit[name])).astype(float) if name in visit else none)
        return np.stack(columns, 1)

    def _scores(self, visit: Mapping[str, Any], places: np.ndarray) -> np.ndarray:
        return np.asarray(self._ranker.predict(self._features(visit, places), num_threads=1))

    # Measuring

    def measure(self, visits: Source) -> dict[str, dict[str, Score]]:
        """What was bought on visits that were not learned from, found among all items: {"recalled": {recall@300},
        "ranked": ..., "near": ..., "popular": {recall@1, 5, 10, mrr, ndcg@10, auc}}.

        near: by nearness to the customer's vector alone; popular: by how often it was bought. auc: share of the other
        items shown that stand behind what was bought, where the visits say what was shown.
        """
        records = [r for r in _checked(visits, list(self.context)) if r["bought"] in self._place]
        if not records:
            raise DataError(f"{visits.name}: nothing that was bought is in the index {self.index.path}.")
        found: list[float] = []
        ranks: dict[str, list[int]] = {"ranked": [], "near": [], "popular": []}
        areas: dict[str, list[float]] = {name: [] for name in ranks}
        for record, places in zip(records, self._candidates(records), strict=True):
            right, history = self._place[record["bought"]], self._known(record)
            found.append(float(right in places))
            near = self._vectors @ self._customer(history) if history else np.zeros(len(self._ids))
            rows = {"near": near, "popular": self._bought, "ranked": np.full(len(self._ids), -np.inf)}
            rows["ranked"][places] = self._scores(record, places)
            shown = np.array([self._place[n] for n in record.get("shown") or [] if n in self._place], int)
            rest = np.ones(len(self._ids), bool)
            rest[[right, *history]] = False
            for name, row in rows.items():
                ranks[name].append(int((row[rest] >= row[right]).sum()))  # of equal ones it comes last
                if right in shown and len(shown) > 1:
                    seen = self._scores(record, shown) if name == "ranked" else row[shown]
                    mine, others = seen[shown == right][0], seen[shown != right]
                    areas[name].append(float(np.mean((others < mine) + 0.5 * (others == mine))))
        result = {"recalled": {f"recall@{RECALLED}": score_of(Values.mean(found))}}
        for name, of in ranks.items():
            result[name] = scores_of_ranks(np.array(of))
            if areas[name]:
                result[name]["auc"] = score_of(Values.mean(areas[name]))
        return result

    # Keeping

    def save(self, path: str | Path) -> None:
        """Raises UsageError where there is something already."""
        path = Path(path)
        require_new(path)
        bought = {str(i): int(n) for i, n in zip(self._ids, self._bought, strict=True) if n}
        about = {"index": str(self.index.path.resolve()), "context": self.context, "bought": bought}

        def write(folder: Path) -> None:
            (folder / "recommender.json").write_text(json.dumps(about, ensure_ascii=False), "utf-8")
            self._ranker.save_model(str(folder / "ranker.txt"))

        write_whole(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Recommender:
        """Raises UsageError where there is none, or where its index has other columns now."""
        import lightgbm

        path = Path(path)
        try:
            about = json.loads((path / "recommender.json").read_text("utf-8"))
            ranker = lightgbm.Booster(model_file=str(path / "ranker.txt"))
        except (OSError, ValueError, lightgbm.basic.LightGBMError) as error:
            raise UsageError(
                f"{path} is no recommender ({type(error).__name__}): `openm6 recommend fit` makes one."
            ) from None
        made = cls(Index.open(about["index"]), about["context"], about["bought"], ranker)
        if ranker.feature_name() != [name.replace(" ", "_") for name in made.features]:
            raise UsageError(f"{about['index']} has other columns than when {path} was made: fit it anew.")
        return made


def _checked(visits: Source, context: Sequence[str]) -> list[dict[str, Any]]:
    """The visits as records; history as a list of texts."""
    require_columns(visits.columns, ("history", "bought", *context), visits.name)
    checked = []
    for record in visits:
        history = record["history"]
        if isinstance(history, str):  # a CSV's: ids with spaces or commas between
            history = history.replace(",", " ").split()
        if not isinstance(history, list) or record.get("bought") in (None, ""):
            raise DataError(f"{record.get('_where', visits.name)}: history has to be a list of ids, bought an id.")
        checked.append({**record, "history": [str(name) for name in history], "bought": str(record["bought"])})
    return checked

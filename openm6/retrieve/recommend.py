"""A two-stage recommender: recall from an index by vector similarity and popularity, then ranking by boosted trees
(LightGBM) on similarity, popularity, item columns and context.

A visit, the unit of its training and evaluation data, is a record with history (ids, oldest first), bought (an id),
optionally shown (ids of the displayed items), and columns of context such as the season.

    DIR/recommender.json    index, columns, number of purchases per item, size of the training data
    DIR/ranker.txt          the trees in LightGBM's format
    DIR/rejects.jsonl       visits left out of training, with the reasons (written by the command)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.core.extras import require
from openm6.core.files import require_new, write_whole
from openm6.data.columns import require_columns
from openm6.data.rejects import OnReject, Reject
from openm6.data.source import Source
from openm6.data.store import Record
from openm6.retrieve.columns import id_of
from openm6.retrieve.index import Hit, Index, Items
from openm6.retrieve.ranks import scores_of_ranks
from openm6.tasks.metrics import Score, Values, score_of

NEAREST, LIKED, POPULAR = 150, 100, 50
"""Number of recalled candidates: nearest to the history; most bought of the near ones; most bought of all."""
WIDE = 10
"""Size of the neighbourhood that LIKED items come from, as a multiple of NEAREST."""
RECALLED = NEAREST + LIKED + POPULAR
DECAY = 0.8
"""Decay per item of the history, from the last one backwards, in the customer's vector."""
NEGATIVES = 30
"""Number of negatives per training group."""
HEAD = 0.2
"""Fraction of the items, the best sellers, that are not in the long tail."""
MOST, CHUNK = 50, 64
"""Number of last items of a history that count; number of visits per index query."""

_TREES = {
    "objective": "lambdarank", "learning_rate": 0.05, "num_leaves": 15, "min_data_in_leaf": 50, "verbosity": -1,
    "lambdarank_truncation_level": 20, "feature_fraction": 0.8, "bagging_fraction": 0.8, "bagging_freq": 1,
    "deterministic": True, "force_row_wise": True,
}  # fmt: skip
_NUMBERS, _ROUNDS = ("int64", "float64"), 200
_NOTHING = f"the purchase is not among the {RECALLED} recalled items, and no other item was shown."


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The items for one visit, best first.

    from_history    False if the index has no item of the history: the items are best sellers, ranked by the context
    unknown         ids of the history that the index does not have
    """

    items: list[Hit]
    from_history: bool
    unknown: list[str]


@dataclass(frozen=True, slots=True)
class Learned:
    """Number of training visits, and of those among them without an item of the index in their history."""

    visits: int
    without_history: int


class Recommender:
    """A recommender on an index, made by `Recommender.fit` or opened by `Recommender.load`."""

    def __init__(
        self, index: Index, context: Mapping[str, list[str] | None], bought: Mapping[str, int], ranker: Any,
        columns: Mapping[str, list[str] | None] | None = None, learned: Learned | None = None,
    ):  # fmt: skip
        """`context`, and the index's `columns` that the ranker uses: name to values, None for a numeric column;
        `bought`: number of purchases by id. `columns` default to those of `_columns_of`."""
        items = index.items(list(index.about["columns"]))
        self.index, self.context, self._ranker = index, dict(context), ranker
        self.learned = learned or Learned(0, 0)
        self.columns = dict(_columns_of(items, index.about["columns"]) if columns is None else columns)
        self._ids, self._vectors, self._shown = items.ids, items.vectors, items.columns
        self._place = {name: place for place, name in enumerate(items.ids)}
        self._bought = np.array([bought.get(name, 0) for name in items.ids], float)
        self._texts: dict[str, np.ndarray] = {}
        self._numbers: dict[str, np.ndarray] = {}
        self._codes: dict[str, np.ndarray] = {}
        for name, known in self.columns.items():
            if known is None:
                values = [np.nan if v is None else float(v) for v in items.columns[name]]
                self._numbers[name] = np.sign(values) * np.log1p(np.abs(values))
                continue
            self._texts[name] = texts = np.array([str(v) for v in items.columns[name]], object)
            # Items added after training may have new values; the trained ones keep their codes.
            codes = {value: code for code, value in enumerate([*known, *sorted({*texts} - {*known})])}
            self._codes[name] = np.array([codes[text] for text in texts])

    @classmethod
    def fit(
        cls, index: Index, visits: Source, context: Sequence[str] = (), seed: int = 0, on_reject: OnReject | None = None
    ) -> Recommender:
        """Train the ranker on visits; `learned` of the result counts them.

        `on_reject` gets every visit left out: with an invalid history or purchase, with a purchase that the index does
        not have, or without a training group. Without it the first visit of the former two kinds raises DataError.
        Raises UsageError for missing columns, DataError if no visit is left."""
        records = usable_visits(visits, context, index.ids(), on_reject)
        values: dict[str, list[str] | None] = {}
        for name in context:
            found = [record.get(name) for record in records]
            numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found if v is not None)
            values[name] = None if numeric else sorted({str(v) for v in found})
        made = cls(index, values, Counter(name for one in records for name in [*one["history"], one["bought"]]), None)
        made._learn(records, seed, on_reject or (lambda reject: None))
        return made

    def _learn(self, records: list[dict[str, Any]], seed: int, on_reject: OnReject) -> None:
        import lightgbm

        rng = np.random.default_rng(seed)
        rows, labels = [], []
        groups: list[int] = []
        visits = without_history = 0
        for record, candidates in zip(records, self._candidates(records), strict=True):
            right = self._place[record["bought"]]
            # A purchase outside the recalled items would teach the ranker that similar items are wrong. The other
            # shown items are a training group of their own.
            offered = [self._place[name] for name in record["shown"] if name in self._place]
            before = len(groups)
            for others in (candidates if right in candidates else [], offered):
                if wrong := [place for place in others if place != right]:
                    some = rng.choice(wrong, min(NEGATIVES, len(wrong)), replace=False)
                    features = self._features(record, np.array([right, *some]), without=right)
                    rows.append(np.stack(list(features.values()), 1))
                    labels += [1] + [0] * len(some)
                    groups.append(1 + len(some))
            if len(groups) > before:
                visits += 1
                without_history += not self._known(record)
            else:
                on_reject(Reject(record["_where"], f"{record['_where']}: {_NOTHING}"))
        if not rows:
            raise DataError(f"No visit can be used for training: {_NOTHING}")
        self.learned = Learned(visits, without_history)
        data = lightgbm.Dataset(
            np.concatenate(rows), label=labels, group=groups, feature_name=list(features),
            categorical_feature=[name for name in features if name.startswith(("is ", "at "))],
        )  # fmt: skip
        self._ranker = lightgbm.train({**_TREES, "seed": seed}, data, _ROUNDS)

    def recommend(
        self, history: Sequence[str], context: Mapping[str, Any] | None = None, k: int = 10
    ) -> Recommendations:
        """The at most k best items, none of them of the history. Ids that the index does not have are ignored and
        returned in `unknown`; without a known history the items are best sellers. Raises UsageError for an unknown
        context column or value."""
        if k < 1:
            raise UsageError(f"k is {k}; it has to be at least 1.")
        given = dict(context or {})
        for name, value in given.items():
            if name not in self.context:
                known = ", ".join(self.context) or "none"
                raise UsageError(f"There is no context {name!r}.{suggest(name, list(self.context))} Known: {known}.")
            known_values = self.context[name]
            if known_values is None and np.isnan(_number(value)):
                raise UsageError(f"{name} is a number, not {value!r}.")
            if known_values is not None and str(value) not in known_values:
                raise UsageError(f"{name} is one of {', '.join(known_values)}, not {value!r}.")
        visit = {**given, "history": list(map(str, history))}
        places = next(iter(self._candidates([visit], -(-k // RECALLED))))
        scores, items = self._scores(visit, places), []
        for number in np.argsort(-scores, kind="stable")[:k]:
            columns = {name: values[int(places[number])] for name, values in self._shown.items()}
            items.append(Hit(str(self._ids[places[number]]), float(scores[number]), columns))
        unknown = [name for name in dict.fromkeys(visit["history"]) if name not in self._place]
        return Recommendations(items, bool(self._known(visit)), unknown)

    def _known(self, visit: Mapping[str, Any]) -> list[int]:
        return [self._place[name] for name in visit["history"] if name in self._place][-MOST:]

    def _candidates(self, visits: Sequence[Mapping[str, Any]], times: int = 1) -> Iterator[np.ndarray]:
        """The places of at most `times` x RECALLED items for each visit, none of the history: the nearest to an item of
        the history or to its mean, the most bought of the near ones, and the most bought."""
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
        """The weighted mean of the items' vectors, the last ones weighing most; unit length, fp32 [dims]."""
        weights = DECAY ** np.arange(len(history))[::-1]
        vector = weights @ self._vectors[list(history)]
        return np.asarray(vector / max(np.linalg.norm(vector), 1e-9), np.float32)

    def _features(self, visit: Mapping[str, Any], places: np.ndarray, without: int = -1) -> dict[str, np.ndarray]:
        """Features [places] of the ranker by name, NaN for unknown values; names of categories begin with "is" or "at".
        `without`: place whose own purchase is not counted."""
        history = self._known(visit)
        none = np.full(len(places), np.nan)
        columns = {"near all": none, "nearest": none, "near the last": none}
        if history:
            near = self._vectors[places] @ self._vectors[history].T
            whole = self._vectors[places] @ self._customer(history)
            columns = {"near all": whole, "nearest": near.max(1), "near the last": near[:, -1]}
        columns["bought"] = np.log1p(np.maximum(0, self._bought[places] - (places == without)))
        for name, codes in self._codes.items():
            same = (codes[places][:, None] == codes[history]).mean(1) if history else none
            columns |= {f"is {name}": codes[places].astype(float), f"share of {name}": same}
        for name, numbers in self._numbers.items():
            above = numbers[places] - np.nanmean(numbers[history]) if history else none
            columns |= {f"has {name}": numbers[places], f"above {name}": above}
        for name, values in self.context.items():
            value = visit.get(name)
            code = _number(value) if values is None else values.index(str(value)) if str(value) in values else np.nan
            columns[f"{'of' if values is None else 'at'} {name}"] = np.full(len(places), code)
        for name, texts in self._texts.items():
            if self.context.get(name) is not None:
                is_asked = (texts[places] == str(visit[name])).astype(float) if name in visit else none
                columns[f"{name} as asked"] = is_asked
        return columns

    def _scores(self, visit: Mapping[str, Any], places: np.ndarray) -> np.ndarray:
        features = np.stack(list(self._features(visit, places).values()), 1)
        return np.asarray(self._ranker.predict(features, num_threads=1))

    def measure(self, visits: Source, on_reject: OnReject | None = None) -> dict[str, dict[str, dict[str, Score]]]:
        """Rank the purchases of held-out visits among all items, by slice of the visits: {"all": {"recalled":
        {recall@300}, "ranked": ..., "near": ..., "popular": {recall@1, 5, 10, mrr, ndcg@10, auc}}, ...}.

        Slices (empty ones are left out): "without history" (no item of the index), "long tail" (the purchase is not
        among the HEAD of the items), "never bought" (in training). Baselines: near, by similarity to the customer's
        vector; popular, by number of purchases. auc: fraction of the other shown items ranked below the purchase, if
        the visits have shown items. `on_reject`: see `fit`.
        """
        records = usable_visits(visits, list(self.context), self._place, on_reject)
        bought = np.array([self._place[record["bought"]] for record in records])
        head = np.argsort(-self._bought, kind="stable")[: round(HEAD * len(self._ids))]
        slices = {
            "all": np.ones(len(records), bool),
            "without history": np.array([not self._known(record) for record in records]),
            "long tail": ~np.isin(bought, head),
            "never bought": self._bought[bought] == 0,
        }
        found: list[float] = []
        ranks: dict[str, list[int]] = {"ranked": [], "near": [], "popular": []}
        areas: dict[str, list[float]] = {name: [] for name in ranks}
        for record, right, places in zip(records, bought, self._candidates(records), strict=True):
            history = self._known(record)
            found.append(float(right in places))
            near = self._vectors @ self._customer(history) if history else np.zeros(len(self._ids))
            rows = {"near": near, "popular": self._bought, "ranked": np.full(len(self._ids), -np.inf)}
            rows["ranked"][places] = self._scores(record, places)
            shown = np.array([self._place[n] for n in record["shown"] if n in self._place], int)
            rest = np.ones(len(self._ids), bool)
            rest[[right, *history]] = False
            for name, row in rows.items():
                ranks[name].append(int((row[rest] >= row[right]).sum()))  # ties count against it
                area = np.nan
                if right in shown and len(shown) > 1:
                    seen = self._scores(record, shown) if name == "ranked" else row[shown]
                    mine, others = seen[shown == right][0], seen[shown != right]
                    area = float(np.mean((others < mine) + 0.5 * (others == mine)))
                areas[name].append(area)
        return {name: _scores_of(found, ranks, areas, chosen) for name, chosen in slices.items() if chosen.any()}

    def save(self, path: str | Path) -> None:
        """Write the recommender to a new folder. Raises UsageError for an existing path."""
        path = Path(path)
        require_new(path)
        bought = {str(i): int(n) for i, n in zip(self._ids, self._bought, strict=True) if n}
        about = {
            "index": str(self.index.path.resolve()), "context": self.context, "columns": self.columns,
            "learned": asdict(self.learned), "bought": bought,
        }  # fmt: skip

        def write(folder: Path) -> None:
            (folder / "recommender.json").write_text(json.dumps(about, ensure_ascii=False), "utf-8")
            self._ranker.save_model(str(folder / "ranker.txt"))

        write_whole(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Recommender:
        """Open a recommender. Raises UsageError for another folder, or if its index has other columns now."""
        require("retrieve", "lightgbm")
        import lightgbm

        path = Path(path)
        try:
            about = json.loads((path / "recommender.json").read_text("utf-8"))
            ranker = lightgbm.Booster(model_file=str(path / "ranker.txt"))
            columns, learned = dict(about["columns"]), Learned(**about["learned"])
        except (OSError, ValueError, KeyError, lightgbm.basic.LightGBMError) as error:
            raise UsageError(
                f"{path} is not a recommender ({type(error).__name__}): make one by `openm6 recommend fit`."
            ) from None
        index = Index.open(about["index"])
        kinds = {name: kind in _NUMBERS for name, kind in index.about["columns"].items()}
        if any(kinds.get(name) is not (known is None) for name, known in columns.items()):
            raise UsageError(f"{about['index']} has other columns than when {path} was trained: fit it again.")
        return cls(index, about["context"], about["bought"], ranker, columns, learned)


def _number(value: Any) -> float:
    """The value of a numeric context column, NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _columns_of(items: Items, kinds: Mapping[str, str]) -> dict[str, list[str] | None]:
    """The columns of an index that serve as features: numbers, and texts with at most one distinct value per two items.
    Others, such as titles and pictures, would identify single items."""
    columns: dict[str, list[str] | None] = {}
    for name, kind in kinds.items():
        values = None if kind in _NUMBERS else sorted({str(value) for value in items.columns[name]})
        if values is None or 2 * len(values) <= len(items.ids):
            columns[name] = values
    return columns


def _scores_of(
    found: Sequence[float], ranks: Mapping[str, Sequence[int]], areas: Mapping[str, Sequence[float]], chosen: np.ndarray
) -> dict[str, dict[str, Score]]:
    """The metrics of the `chosen` visits; the AUC of a visit without shown items is NaN."""
    result = {"recalled": {f"recall@{RECALLED}": score_of(Values.mean(np.array(found)[chosen].tolist()))}}
    for name, of in ranks.items():
        result[name] = scores_of_ranks(np.array(of)[chosen])
        if known := [area for area in np.array(areas[name])[chosen].tolist() if not np.isnan(area)]:
            result[name]["auc"] = score_of(Values.mean(known))
    return result


def usable_visits(
    visits: Source, context: Sequence[str], known: Container[str], on_reject: OnReject | None
) -> list[Record]:
    """The visits with a valid history and a purchase among the `known` ids; `history` and `shown` are lists of ids,
    `_where` is the place of the record.

    `on_reject` gets every other visit; without it the first one raises DataError, as does a source without a valid
    visit. Raises UsageError for missing columns."""
    require_columns(visits.columns, ("history", "bought", *context), visits.name)
    usable: list[Record] = []
    rejected = list(visits.rejected)
    for number, record in enumerate(visits):
        where = str(record.get("_where", f"{visits.name}#{number}"))
        try:
            history, shown = _ids(where, "history", record.get("history")), record.get("shown")
            lists = {"history": history, "shown": [] if shown is None else _ids(where, "shown", shown)}
            bought = id_of(f"{where}: bought", record.get("bought"))
            if bought not in known:
                raise DataError(f"{where}: what was bought is not in the index.")
        except DataError as error:
            rejected.append(Reject(where, str(error)))
        else:
            usable.append({**record, **lists, "bought": bought, "_where": where})
    if rejected and not usable:
        raise DataError(f"None of the {len(rejected)} visits can be used; the first: {rejected[0].reason}")
    for reject in rejected:
        if on_reject is None:
            raise DataError(reject.reason)
        on_reject(reject)
    return usable


def _ids(where: str, name: str, value: Any) -> list[str]:
    """The ids of a history: a list, or a text separated by spaces or commas, as in a CSV."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list):
        given = "missing" if value is None else cut(repr(value))
        raise DataError(f"{where}: {name} is {given}; it has to be a list of ids, [] where there are none.")
    return [id_of(f"{where}: {name}", one) for one in value]

"""The recommender: what it must learn from visits whose rule the test knows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.data.source import Source
from openm6.data.store import ListRecords
from openm6.errors import DataError, OpenM6Error, UsageError
from openm6.retrieve.index import Index
from openm6.retrieve.recommend import Recommender

GROUPS, EACH, DIMS = 8, 30, 16
SEASONS = ("夏季", "冬季")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Eight groups of near items; half of each are for summer, half for winter."""
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(GROUPS, DIMS))
    made = Index.create(tmp_path_factory.mktemp("recommend") / "goods", DIMS, {"season": "string", "price": "float64"})
    vectors = (middles[:, None] + rng.normal(0, 0.2, (GROUPS, EACH, DIMS))).reshape(-1, DIMS)
    ids = [f"{group}-{number}" for group in range(GROUPS) for number in range(EACH)]
    made.add(
        ids, vectors, {"season": [SEASONS[i % 2] for i in range(len(ids))], "price": [1.0 * i for i in range(240)]}
    )
    return made


def visits(count: int, seed: int) -> Source:
    """Customers stay with their group and buy what is of the season."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        group, season = int(rng.integers(GROUPS)), int(rng.integers(2))
        mine = rng.permutation(EACH)
        bought = int(next(number for number in mine[3:] if number % 2 == season))
        others = [f"{rng.integers(GROUPS)}-{rng.integers(EACH)}" for _ in range(4)]
        records.append(
            {
                "history": [f"{group}-{number}" for number in mine[:3]], "season": SEASONS[season],
                "bought": f"{group}-{bought}", "shown": [f"{group}-{bought}", *others],
            }
        )  # fmt: skip
    return Source("visits", ListRecords(records))


@pytest.fixture(scope="module")
def made(index: Index) -> Recommender:
    return Recommender.fit(index, visits(400, 1), ["season"])


def test_it_learns_what_is_near_and_of_the_season(made: Recommender) -> None:
    found = made.measure(visits(200, 2))
    # 27 of the group are left, half of them of the season: ten of some thirteen.
    assert found["ranked"]["recall@10"].value > 0.55
    assert 0.2 < found["near"]["recall@10"].value < 0.5 and found["popular"]["recall@10"].value < 0.15
    assert found["recalled"]["recall@300"].value == 1
    assert found["ranked"]["auc"].value > 0.9 > found["popular"]["auc"].value
    best = made.recommend(["3-0", "3-1"], {"season": "冬季"}, 8)
    assert {one.id.split("-")[0] for one in best} == {"3"} and all(int(one.id.split("-")[1]) % 2 for one in best)
    assert not {"3-0", "3-1"} & {one.id for one in best}
    assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)


def test_a_measure_is_what_a_slow_count_says(made: Recommender) -> None:
    some = visits(20, 3)
    found = made.measure(some)["ranked"]
    hits = [
        record["bought"] in [one.id for one in made.recommend(record["history"], {"season": record["season"]}, 10)]
        for record in some
    ]
    assert found["recall@10"].value == pytest.approx(np.mean(hits))


def test_saved_and_loaded_it_recommends_the_same(made: Recommender, tmp_path: Path) -> None:
    made.save(tmp_path / "next")
    again = Recommender.load(tmp_path / "next")
    assert again.recommend(["5-2"], {"season": "夏季"}) == made.recommend(["5-2"], {"season": "夏季"})
    with pytest.raises(UsageError, match="already"):
        made.save(tmp_path / "next")
    with pytest.raises(UsageError, match="no recommender"):
        Recommender.load(tmp_path / "other")


def test_without_a_history_what_sells_of_the_season_comes_first(made: Recommender) -> None:
    for history in ([], ["unknown"]):
        best = made.recommend(history, {"season": "夏季"}, 5)
        assert len(best) == 5 and sum(int(one.id.split("-")[1]) % 2 == 0 for one in best) >= 4


def test_k_beyond_the_index_gives_what_there_is(made: Recommender) -> None:
    assert len(made.recommend(["0-0"], {}, 1000)) == GROUPS * EACH - 1


def test_what_cannot_be_is_refused(made: Recommender, index: Index) -> None:
    with pytest.raises(UsageError, match="season is one of 冬季, 夏季, not '春季'"):
        made.recommend([], {"season": "春季"})
    with pytest.raises(UsageError, match="no context 'saeson'.*season"):
        made.recommend([], {"saeson": "夏季"})
    with pytest.raises(UsageError, match="k is 0"):
        made.recommend([], k=0)
    with pytest.raises(UsageError, match="no column 'bought'"):
        Recommender.fit(index, Source("bad", ListRecords([{"history": ["1"]}])))
    with pytest.raises(DataError, match="history has to be a list"):
        Recommender.fit(index, Source("bad", ListRecords([{"history": 3, "bought": "0-1"}])))
    with pytest.raises(DataError, match="nothing that was bought is in the index"):
        Recommender.fit(index, Source("bad", ListRecords([{"history": [], "bought": "x"}])))


def test_the_commands(index: Index, tmp_path: Path) -> None:
    file = tmp_path / "visits.jsonl"
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in visits(100, 4)), "utf-8")
    place = tmp_path / "next"

    def call(*words: object) -> Any:
        done = CliRunner().invoke(commands(), ["recommend", *map(str, words), "--json"])
        if isinstance(done.exception, OpenM6Error):
            raise done.exception
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    told = call("fit", place, "--index", index.path, "--visits", file, "--context", "season")
    assert told["visits"] == 100 and told["items"] == GROUPS * EACH
    assert call("eval", place, "--visits", file)["ranked"]["recall@10"][3] == 100
    found = call("for", place, "season=冬季", "--history", "2-1, 2-3", "-k", 4)
    assert len(found) == 4 and found[0]["id"].startswith("2-")
    with pytest.raises(UsageError, match="already"):
        call("fit", place, "--index", index.path, "--visits", file)

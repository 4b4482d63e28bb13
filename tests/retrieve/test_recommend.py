"""The recommender: what it must learn from visits whose rule the test knows, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.data.rejects import Reject
from openm6.data.source import Source
from openm6.data.store import ListRecords
from openm6.retrieve.index import Index
from openm6.retrieve.recommend import Learned, Recommender
from tests.conftest import command

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


@pytest.mark.slow
def test_it_learns_what_is_near_and_of_the_season(made: Recommender) -> None:
    found = made.measure(visits(200, 2))["all"]
    # 27 of the group are left, half of them of the season: ten of some thirteen.
    assert found["ranked"]["recall@10"].value > 0.55
    assert 0.2 < found["near"]["recall@10"].value < 0.5 and found["popular"]["recall@10"].value < 0.15
    assert found["recalled"]["recall@300"].value == 1
    assert found["ranked"]["auc"].value > 0.9 > found["popular"]["auc"].value
    answer = made.recommend(["3-0", "3-1"], {"season": "冬季"}, 8)
    best = answer.items
    assert answer.from_history and answer.unknown == []
    assert {one.id.split("-")[0] for one in best} == {"3"} and all(int(one.id.split("-")[1]) % 2 for one in best)
    assert not {"3-0", "3-1"} & {one.id for one in best}
    assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)


@pytest.mark.slow
def test_a_measure_is_what_a_slow_count_says(made: Recommender) -> None:
    some = visits(20, 3)
    found = made.measure(some)["all"]["ranked"]
    hits = [
        record["bought"]
        in [one.id for one in made.recommend(record["history"], {"season": record["season"]}, 10).items]
        for record in some
    ]
    assert found["recall@10"].value == pytest.approx(np.mean(hits))


def test_saved_and_loaded_it_recommends_the_same(made: Recommender, tmp_path: Path) -> None:
    made.save(tmp_path / "next")
    again = Recommender.load(tmp_path / "next")
    assert again.recommend(["5-2"], {"season": "夏季"}) == made.recommend(["5-2"], {"season": "夏季"})
    with pytest.raises(UsageError, match="already"):
        made.save(tmp_path / "next")
    with pytest.raises(UsageError, match="not a recommender"):
        Recommender.load(tmp_path / "other")


def test_without_a_known_history_best_sellers_of_the_season_come_and_the_answer_says_so(made: Recommender) -> None:
    for history in ([], ["unknown", "3-99", "unknown"]):
        answer = made.recommend(history, {"season": "夏季"}, 5)
        assert len(answer.items) == 5 and sum(int(one.id.split("-")[1]) % 2 == 0 for one in answer.items) >= 4
        assert not answer.from_history and answer.unknown == list(dict.fromkeys(history))


def test_unknown_ids_of_a_known_history_are_named(made: Recommender) -> None:
    answer = made.recommend(["3-0", "other"], {"season": "冬季"}, 8)
    assert answer.from_history and answer.unknown == ["other"]
    assert answer.items == made.recommend(["3-0"], {"season": "冬季"}, 8).items


def test_k_beyond_the_index_gives_what_there_is(made: Recommender) -> None:
    assert len(made.recommend(["0-0"], {}, 1000).items) == GROUPS * EACH - 1


NOT_USABLE: list[tuple[dict[str, Any], str]] = [
    ({"bought": "0-1"}, "history is missing; it has to be a list of ids, [] where there are none"),
    ({"history": 3, "bought": "0-1"}, "history is 3; it has to be a list of ids"),
    ({"history": ["0-1", 2.5], "bought": "0-1"}, "history: the id is 2.5: an id is a text or a whole number"),
    ({"history": []}, "bought: the id is missing"),
    ({"history": [], "bought": "0-1", "shown": 7}, "shown is 7; it has to be a list of ids"),
    ({"history": ["0-2"], "bought": "9-9"}, "what was bought is not in the index"),
]


@pytest.mark.slow
def test_visits_that_cannot_be_used_are_given_with_their_reason(index: Index) -> None:
    some = [*visits(100, 5), *(record for record, _ in NOT_USABLE)]
    rejected: list[Reject] = []
    learned = Recommender.fit(index, Source("some", ListRecords(some)), ["season"], on_reject=rejected.append)
    assert learned.learned == Learned(visits=100, without_history=0)
    assert [reject.where for reject in rejected] == [f"some#{number}" for number in range(100, 106)]
    for reject, (_, reason) in zip(rejected, NOT_USABLE, strict=True):
        assert reason in reject.reason
    # They count for nothing: not for what is learned, nor for how often a thing was bought.
    again = Recommender.fit(index, Source("some", ListRecords(some[:100])), ["season"])
    assert learned.recommend([], {"season": "夏季"}) == again.recommend([], {"season": "夏季"})
    measured: list[Reject] = []
    found = learned.measure(Source("some", ListRecords(some)), measured.append)
    assert measured == rejected and found["all"]["ranked"]["mrr"].n == 100


def test_a_visit_that_teaches_nothing_is_no_visit_learned_from(tmp_path: Path) -> None:
    """Of 2,000 items on half a circle the last is neither near to the first nor bought often: it is not recalled."""
    index = Index.create(tmp_path / "row", 2)
    angles = np.linspace(0, np.pi, 2000)
    ids = [str(number) for number in range(2000)]
    index.add(ids, np.stack([np.cos(angles), np.sin(angles)], 1))
    some = [{"history": [str(n)], "bought": str(n + 1)} for n in range(1000, 1400)]
    some += [{"history": ["0"], "bought": "1999"}, {"history": ["nowhere"], "bought": "1010"}]
    rejected: list[Reject] = []
    made = Recommender.fit(index, Source("row", ListRecords(some)), on_reject=rejected.append)
    assert [reject.where for reject in rejected] == ["row#400"]
    assert "not among the 300 recalled items" in rejected[0].reason
    assert made.learned == Learned(visits=401, without_history=1)


def test_measures_are_told_for_customers_and_items_that_are_new_too(made: Recommender) -> None:
    some = [
        {**record, "history": [] if number < 20 else record["history"]} for number, record in enumerate(visits(100, 6))
    ]
    found = made.measure(Source("some", ListRecords(some)))
    counts = {name: ways["ranked"]["mrr"].n for name, ways in found.items()}
    assert counts["all"] == 100 and counts["without history"] == 20 and 0 < counts["long tail"] < 100
    sold = Counter(name for record in visits(400, 1) for name in [*record["history"], record["bought"]])
    assert counts.get("never bought", 0) == sum(record["bought"] not in sold for record in some)
    assert found["without history"]["near"]["recall@10"].value == 0


def test_titles_are_shown_and_tell_the_ranker_nothing(tmp_path: Path) -> None:
    """Each item has a title of its own; two items in three were bought in winter."""
    rng = np.random.default_rng(0)
    index = Index.create(tmp_path / "goods", DIMS, {"title": "string", "season": "string"})
    ids = [str(number) for number in range(60)]
    columns = {"title": [f"围巾{number}" for number in ids], "season": [SEASONS[number % 2] for number in range(60)]}
    index.add(ids, rng.normal(size=(60, DIMS)), columns)
    some = [{"history": [], "bought": str(rng.integers(60))} for _ in range(60)]
    made = Recommender.fit(index, Source("some", ListRecords(some)))
    assert list(made.columns) == ["season"]
    made.save(tmp_path / "next")
    for one in made.recommend(["3"], k=60).items:
        assert one.columns == {"title": f"围巾{one.id}", "season": SEASONS[int(one.id) % 2]}
    # Items that came later change nothing of what is known of the others, whatever their columns hold.
    before = {one.id: one.score for one in Recommender.load(tmp_path / "next").recommend([], k=60).items}
    index.add(["new"], rng.normal(size=(1, DIMS)), {"title": ["围巾"], "season": ["a season that sorts first"]})
    after = {one.id: one.score for one in Recommender.load(tmp_path / "next").recommend([], k=61).items}
    after.pop("new")
    assert after == before


def test_what_cannot_be_is_refused(made: Recommender, index: Index) -> None:
    with pytest.raises(UsageError, match="season is one of 冬季, 夏季, not '春季'"):
        made.recommend([], {"season": "春季"})
    with pytest.raises(UsageError, match="no context 'saeson'.*season"):
        made.recommend([], {"saeson": "夏季"})
    with pytest.raises(UsageError, match="k is 0"):
        made.recommend([], k=0)
    with pytest.raises(UsageError, match="no column 'bought'"):
        Recommender.fit(index, Source("bad", ListRecords([{"history": ["1"]}])))
    with pytest.raises(DataError, match="history is 3; it has to be a list"):
        Recommender.fit(index, Source("bad", ListRecords([{"history": 3, "bought": "0-1"}])))
    with pytest.raises(
        DataError, match="None of the 1 visits can be used; the first: bad#0: what was bought is not in"
    ):
        Recommender.fit(index, Source("bad", ListRecords([{"history": [], "bought": "x"}])))


@pytest.mark.slow
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
    assert told["visits"] == 100 and told["items"] == GROUPS * EACH and told["rejected"] == []
    assert "Fewer than 300 visits" in told["notes"][0] and not (place / "rejects.jsonl").exists()
    assert call("eval", place, "--visits", file)["slices"]["all"]["ranked"]["recall@10"][3] == 100
    found = call("for", place, "season=冬季", "--history", "2-1, 2-3, 2-99", "-k", 4)
    assert len(found["items"]) == 4 and found["items"][0]["id"].startswith("2-")
    assert found["from_history"] and found["unknown"] == ["2-99"] and found["items"][0]["price"] >= 0
    with pytest.raises(UsageError, match="already"):
        call("fit", place, "--index", index.path, "--visits", file)


def test_the_command_counts_what_it_has_passed_over(index: Index, tmp_path: Path) -> None:
    records = [*visits(40, 4), *({"history": ["0-1"], "bought": f"other-{n}", "season": "夏季"} for n in range(199))]
    records.append({"bought": "0-1", "season": "夏季"})
    file, place = tmp_path / "visits.jsonl", tmp_path / "next"
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8")
    said = command("recommend", "fit", place, "--index", index.path, "--visits", file, "--context", "season").stdout
    assert f"trained on 40 of 240 visits to {GROUPS * EACH} items" in said
    assert "200 of 240 records could not be used (most often: what was bought is not in the index)" in said
    assert "Fewer than 300 visits" in said
    lines = [json.loads(line) for line in (place / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [line["where"] for line in lines] == [f"{file}:{number}" for number in range(41, 241)]
    assert "history is missing" in lines[-1]["reason"]
    assert "Visits that could not be used: 200" in command("recommend", "eval", place, "--visits", file).stdout
    said = command("recommend", "for", place, "season=夏季", "--history", "A1,A2").stdout
    assert "The index does not have A1, A2." in said and "best sellers" in said
    said = command("recommend", "for", place, "season=夏季", "--history", "0-1").stdout
    assert "best sellers" not in said and "price" in said


def test_a_context_of_numbers_takes_numbers_alone(index: Index) -> None:
    some = [{**record, "month": number % 12} for number, record in enumerate(visits(60, 6))]
    made = Recommender.fit(index, Source("some", ListRecords(some)), ["month"])
    assert made.recommend(["3-0"], {"month": "6"}) == made.recommend(["3-0"], {"month": 6})
    with pytest.raises(UsageError, match="month is a number, not 'June'"):
        made.recommend(["3-0"], {"month": "June"})
    # On a visit that is measured it is unknown, as an unknown word is.
    empty, none = (Source("one", ListRecords([{**some[0], "month": month}])) for month in ("", None))
    assert made.measure(empty) == made.measure(none)

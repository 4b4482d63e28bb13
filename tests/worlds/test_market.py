"""Generated texts: the same each time, with held-out combinations, and true."""

from __future__ import annotations

import re

import pytest

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.worlds.market import VIEWS, open_market
from openm6.worlds.market.goods import COLUMNS, MERITS, Goods, is_held_out
from openm6.worlds.market.poems import FORMS, RHYMES, form_kept

SPLITS = ("train", "validation", "test")


def some(view: str, split: str = "train", count: int = 300, seed: int = 0) -> list[dict]:
    market = open_market(view, split, seed, count)
    return [market[i] for i in range(count)]


@pytest.mark.parametrize("view", VIEWS)
def test_a_record_depends_on_view_split_seed_and_number_alone(view: str) -> None:
    assert some(view, count=5) == some(view, count=9)[:5]
    assert some(view, count=5) != some(view, count=5, seed=1)
    assert len({str(some(view, split, 5)) for split in SPLITS}) == 3
    record = some(view, count=1)[0]
    assert record["_where"] == f"market:{view}/train#0"
    assert set(open_source(f"market:{view}/train?records=3").columns) == set(record) - {"_where"}
    assert all(value not in ("", None) for value in record.values())


@pytest.mark.parametrize(
    "view", [view for view in VIEWS if view not in ("knowledge", "reviews", "similar", "entailment")]
)
def test_hardly_any_record_comes_twice_and_none_of_the_test_split_in_training(view: str) -> None:
    def shown(split: str) -> list[str]:
        return [str({k: v for k, v in r.items() if k != "_where"}) for r in some(view, split, 400)]

    train, test = shown("train"), shown("test")
    assert len(set(train)) > 0.97 * len(train) and not set(train) & set(test)


@pytest.mark.parametrize("view", ["copy", "live", "talks"])
def test_goods_of_the_test_split_are_held_out(view: str) -> None:
    for split in SPLITS:
        for record in some(view, split, 100):
            row = record["attributes"][0]
            values = {name: row[column] for name, column in COLUMNS.items()}
            goods = Goods(**{**values, "price": int(values["price"][:-1])})
            assert is_held_out(goods) == (split == "test")


def test_copy_tells_what_is_true() -> None:
    for record in some("copy"):
        row = record["attributes"][0]
        for text in record["copy"]:
            assert all(
                row[column] in text for column in ("品类", "颜色", "图案", "材质", "风格", "季节", "价格", "品牌")
            )
            assert all(merit in text for merit in MERITS[row["材质"]])


def test_facts_are_told_each_once_and_nothing_else() -> None:
    for record in some("facts"):
        row = record["attributes"][0]
        assert 4 <= len(row) <= 7
        for text in record["text"]:
            assert all(value in text for value in row.values())
            assert "元" in text or "价格" not in row


def test_a_script_has_what_was_said_and_the_price_that_was_put_right() -> None:
    corrected = 0
    for record in some("live"):
        row, asr, script = record["attributes"][0], record["asr"], record["script"]
        assert not re.search("[，。！？]", asr)
        assert row["品类"] in script and row["颜色"] in script and row["价格"] in script
        for number in re.findall(r"\d+", script):
            assert number in asr
        corrected += "说错了" in asr
        wrong = re.findall(r"(\d+)不对说错了", asr)
        assert not any(f"要{number}元" in script for number in wrong)
    assert 50 < corrected < 140


def test_questions_about_passages_are_answered_in_them() -> None:
    kinds = set()
    for record in some("passages"):
        kinds.add(record["kind"])
        assert record["answer"] in record["passage"]
        assert "主要卖" in record["summary"]
    assert len(kinds) == 6


def test_answers_about_tables_are_true() -> None:
    def number(text: str) -> int:
        return int(text[:-1])

    seen = set()
    for record in some("tables", count=600):
        rows, asked, answer, kind = (record[k] for k in ("table", "question", "answer", "kind"))
        by_name = {row["品类"]: row for row in rows}
        column = next((c for c in ("价格", "库存", "颜色", "材质") if c in asked), "")
        named = [name for name in by_name if name in asked]
        seen.add(kind)
        if kind == "extreme":
            best = (max if "高" in asked else min)(rows, key=lambda r: number(r[column]))
            assert answer == best["品类"]
        elif kind == "compared":
            assert (
                answer == max(sorted(named, key=len)[-2:], key=lambda n: number(by_name[n][column])) or len(named) > 2
            )
        elif kind == "counted":
            colour = re.search("[红橙黄绿蓝紫粉黑]色", asked)
            assert colour and answer == f"{sum(r['颜色'] == colour[0] for r in rows)}件"
        elif kind == "lookup":
            assert answer in {by_name[name][column] for name in named}
        elif answer in by_name:  # found
            assert sum(value in asked for value in by_name[answer].values()) >= 1
    assert seen == {"lookup", "found", "extreme", "counted", "compared"}


def test_reviews_have_their_labels_evenly_and_topics() -> None:
    records = some("reviews", count=900)
    for label in ("好评", "中评", "差评"):
        assert 240 < sum(r["label"] == label for r in records) < 360
    assert {r["topic"] for r in records} == {"质量", "物流", "价格", "外观", "服务"}


def test_replies_are_true_of_the_goods() -> None:
    for record in some("talks"):
        row, reply = record["attributes"][0], record["reply"]
        if "没有" in reply:
            assert f"只有{row['颜色']}" in reply and row["颜色"] not in record["history"].split("\n")[-1]
        elif "不客气" not in reply:
            assert any(value in reply for value in row.values())


def test_what_follows_from_a_premise() -> None:
    for record in some("entailment"):
        premise, hypothesis, label = record["premise"], record["hypothesis"], record["label"]
        colour = re.search("[红橙黄绿蓝紫粉黑]色", hypothesis)
        if colour:
            assert (colour[0] in premise) == (label == "蕴含")
        price = re.search(r"\d+", hypothesis)
        if price:
            mine = re.search(r"(\d+)元", premise)
            assert mine and (int(mine[1]) < int(price[0])) == (label == "蕴含")


def test_likeness_is_the_number_of_attributes_that_agree() -> None:
    counts = [0] * 5
    for record in some("similar"):
        counts[int(record["label"])] += 1
        colours = [re.search("[红橙黄绿蓝紫粉黑]色", record[k])[0] for k in ("first", "second")]  # type: ignore[index]
        if record["label"] in "04":
            assert (colours[0] == colours[1]) == (record["label"] == "4")
    assert min(counts) > 35


def test_poems_keep_form_and_rhyme() -> None:
    for record in some("poems"):
        lines = [line for line in re.split("[，。]", record["poem"]) if line]
        assert form_kept(record["poem"], record["form"]) and len(set(lines)) == FORMS[record["form"]][0]
        ends = {line[-2:] for line in lines[1::2]}
        assert any(ends <= set(group) for group in RHYMES)
    assert not form_kept("红红，绿绿。", "五言绝句")


def test_stories_have_their_keywords() -> None:
    for record in some("stories"):
        assert all(word in record["story"] for word in record["keywords"].split("、"))


def test_a_fifth_of_the_wordings_is_met_in_the_test_split_alone() -> None:
    def asked(split: str) -> set[str]:
        return {
            re.sub(r"^(你好，|想问一下，|我想知道，|麻烦问一下，)", "", r["question"])[-4:]
            for r in some("knowledge", split)
        }

    assert {"如何清洁？"[-4:], "么清洁？"} & asked("test") and "么清洁？" not in asked("train")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("market:copies/train", "no part .* Did you mean"), ("market:copy/dev", "no split"),
        ("market:copy/train?pictures=3", "unknown option pictures"), ("market:copy/train?records=-1", "whole numbers"),
    ],
)  # fmt: skip
def test_what_there_is_not_is_refused(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        open_source(name)


def test_a_market_ends() -> None:
    market = open_market("copy", "test", records=3)
    assert len(market) == 3 and len(list(open_source("market:copy/test?records=3"))) == 3
    with pytest.raises(IndexError):
        open_source("market:copy/test?records=3")[3]

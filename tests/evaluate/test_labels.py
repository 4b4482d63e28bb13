"""Figures of label tasks against scikit-learn's and by hand, and references that no answer can meet."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from sklearn.metrics import f1_score

from openm6.cli.output import table
from openm6.evaluate.labels import LabelFigures, unknown_references
from openm6.tasks.metrics import label_pairs, score, values_of

names = st.sampled_from(["正面", "负面", "中性", "其他"])


@given(st.lists(st.tuples(names, names), min_size=1, max_size=40), st.integers(0, 99))
def test_macro_f1_is_scikit_learns_on_all_and_on_any_choice(pairs: list, seed: int) -> None:
    said, right = (np.array(some) for some in zip(*pairs, strict=True))
    values = values_of("macro_f1", said.tolist(), [[name] for name in right])
    for rows in (np.arange(len(said)), np.random.default_rng(seed).integers(len(said), size=len(said))):
        assert values.corpus(rows) == pytest.approx(f1_score(right[rows], said[rows], average="macro"))


@given(st.lists(st.tuples(names, names), min_size=1, max_size=40))
def test_every_record_is_in_the_confusion_matrix_once(pairs: list) -> None:
    said, right = zip(*pairs, strict=True)
    figures = LabelFigures.of(list(said), [[name] for name in right], ())
    assert figures.confusion.total() == len(pairs)
    assert sum(row["records"] for row in figures.by_label.values()) == len(pairs)
    for name, row in figures.by_label.items():
        asked, answered = right.count(name), said.count(name)
        hits = figures.confusion[name, name]
        assert row["recall"] == pytest.approx(hits / asked if asked else 0)
        assert row["precision"] == pytest.approx(hits / answered if answered else 0)


def test_one_label_in_several_spellings_is_one_and_labels_of_the_task_are_apart() -> None:
    assert label_pairs(["ＯＫ", "no"], [["ok。"], ["yes", "No"]]) == (["ok。", "No"], ["ok。", "No"])
    assert label_pairs([" 好"], [["好！"]], ["好", "好!"]) == (["好"], ["好!"])
    assert label_pairs(["A-", "C"], [["A"], ["C#"]]) == (["A-", "C"], ["A", "C#"])
    assert score("accuracy", ["A-", "C", "？"], [["A"], ["C#"], ["!"]]).value == 0


def test_labels_come_in_the_order_of_the_task_and_json_has_no_zeros() -> None:
    figures = LabelFigures.of(["负面", "正面", "正面"], [["负面"], ["正面"], ["怒"]], ["正面", "负面", "中性"])
    assert list(figures.by_label) == ["正面", "负面", "怒"]
    found = figures.to_dict()
    assert found["confusion"] == {"怒": {"正面": 1}, "正面": {"正面": 1}, "负面": {"负面": 1}}
    assert found["by_label"]["正面"] == {"precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "records": 1}


def test_few_labels_make_a_matrix_and_many_a_list_of_what_is_taken_for_what() -> None:
    figures = LabelFigures.of(["a", "b", "b"], [["a"], ["a"], ["b"]], ["a", "b"])
    (_, _, rows), (title, columns, matrix) = figures.tables(matrix=2, rows=9)
    assert [row[0] for row in rows] == ["a", "b"]
    assert (title, columns[1:], matrix) == ("confusion matrix", ["a", "b"], [["a", "1", "1"], ["b", "0", "1"]])
    many = [str(number) for number in range(300)]
    answers = ["7" if int(name) < 10 else name for name in many]
    (title, _, rows), (other, _, wrong) = LabelFigures.of(answers, [[name] for name in many], many).tables(20, 5)
    assert len(rows) == 5 and title == "by label (the most frequent 5 of 300)"
    assert other == "confusions (the most frequent 5 of 9)" and wrong[0] == ["0", "7", "1"]


def test_references_outside_the_labels_are_counted_named_and_given_the_nearest() -> None:
    wanted = [["正面"], ["正面 "], ["正面的"], ["正面的"], ["neutral"], ["？", "负面"]]
    note = unknown_references(wanted, ["正面", "负面"], "sentiment")
    assert "3 of 6 references are not labels of the task sentiment (正面, 负面)" in note
    assert '"正面的" 2 (nearest: 正面), "neutral" 1.' in note
    assert unknown_references(wanted[:2], ["正面", "负面"], "sentiment") == ""
    many = [[f"x{number}"] for number in range(50)]
    assert "and 45 others" in unknown_references(many, [str(number) for number in range(30)], "t")


def test_a_table_on_the_terminal_shows_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table(["[red]name", "b"], [["[/x] [text:a]", "很长的名字" * 8]], "[text:a] -> [label:b]")
    said = capsys.readouterr().out
    assert all(words in said for words in ("[text:a] -> [label:b]", "[red]name", "[/x]", "[text:a]"))
    assert "".join(said.split()).count("很") == 8

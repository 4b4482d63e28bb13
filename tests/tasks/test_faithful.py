"""PARENT and kept facts, by hand and by what they have to be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from openm6.tasks.faithful import facts_kept, parent
from openm6.tasks.metrics import common_length

TABLE = ["红色", "真丝", "围巾", "199元"]
text = st.text(st.sampled_from("红色真丝围巾的199元，。"), min_size=1, max_size=20)


def of(said: str, wanted: str, table: list[str]) -> float:
    return float(parent([said], [[wanted]], [table]).examples[0])


def test_what_says_all_is_best_and_what_invents_is_worse() -> None:
    wanted = "这条围巾是红色的，真丝做成，199元。"
    assert of(wanted, wanted, TABLE) == pytest.approx(1)
    assert of("这条围巾是红色的，真丝做成，199元。", wanted, TABLE) > of(
        "这条围巾是蓝色的，羊毛做成，299元。", wanted, TABLE
    )
    # In other words than the reference, but borne out by the table, it is better than inventions of its length.
    assert of("红色真丝围巾199元", wanted, TABLE) > of("蓝色羊毛毯子299元", wanted, TABLE)
    assert of("", wanted, TABLE) == 0


def test_by_hand_for_single_characters() -> None:
    # One token: only n = 1. Precision: 红 is in the reference; recall of the reference: the table knows 红 alone,
    # which is told; of the table's one value it has one of two characters.
    assert of("红", "红", ["红色"]) == pytest.approx(2 * 1 * 0.5**0.5 / (1 + 0.5**0.5))
    # What neither bears out counts for nothing.
    assert of("蓝", "红", ["红"]) < 1e-4


@settings(deadline=None)
@given(text, text, st.lists(text, min_size=1, max_size=4))
def test_it_lies_between_0_and_1_and_takes_the_best_reference(said: str, wanted: str, table: list[str]) -> None:
    value = of(said, wanted, table)
    assert 0 <= value <= 1 + 1e-9
    both = parent([said], [[wanted, said]], [table]).examples[0]
    assert both >= value - 1e-12


@given(text, text)
def test_the_common_subsequence_is_symmetric_and_bounded(first: str, second: str) -> None:
    one, other = list(first), list(second)
    assert common_length(one, other) == common_length(other, one) <= min(len(one), len(other))
    assert common_length(one, one) == len(one)


def test_facts_are_kept_word_for_word() -> None:
    found = facts_kept(["红色真丝的，199元。", "红的"], [["x"], ["x"]], [TABLE, []])
    assert found.examples.tolist() == [0.75, 0]

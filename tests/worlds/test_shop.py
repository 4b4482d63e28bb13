"""The shop: held-out goods, looks that neither picture nor text shows whole, visits of customers of their own."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.core.errors import UsageError
from openm6.data.source import open_source
from openm6.worlds.draw import PATTERNS
from openm6.worlds.market.goods import STYLES
from openm6.worlds.pictured import HELD_OUT
from openm6.worlds.scenes import named
from openm6.worlds.shop import AMONG, HISTORY, ITEMS, SHOWN, _Goods, open_shop


@pytest.fixture(autouse=True)
def cache() -> None:
    """Not one of its own for every test: the test goods are photographed once."""


@pytest.fixture(scope="module")
def goods() -> _Goods:
    return _Goods("test", 0, 1000)


@pytest.mark.slow
def test_test_goods_are_held_out_and_train_goods_are_not(goods: _Goods) -> None:
    assert set(goods.items) <= HELD_OUT
    assert not set(_Goods("train", 0, 500).items) & HELD_OUT
    ids = [record["id"] for record in open_source("shop:items/test")]
    assert ids == [row["id"] for row in goods.rows] and len(set(ids)) == 1000


def test_a_look_is_in_picture_and_text_together(goods: _Goods) -> None:
    for row, item in zip(goods.rows, goods.items, strict=True):
        style, _, bold = row["look"].split()
        words = row["title"] + str(row["attributes"])
        assert [name for name in STYLES if name in words] == [style]
        assert item.colour not in words and item.pattern not in words
        assert (bold == "素") == (item.pattern == PATTERNS[0])


@pytest.mark.slow
def test_pairs_share_a_look_more_often_than_chance(goods: _Goods) -> None:
    pairs = open_source("shop:pairs/test?records=200")
    share = np.mean([pair["look"] == pair["other_look"] for pair in pairs])
    chance = np.mean(goods.look[:, None] == goods.look)
    assert share > 3 * chance
    first = pairs[0]
    assert first["photo"] != first["other_photo"] and first["photo"][:2] == b"\xff\xd8"


@pytest.mark.slow
def test_visits_name_goods_of_the_shop_and_what_was_bought_was_shown() -> None:
    known = {row["id"] for row in _Goods("train", 0, ITEMS["train"]).rows}
    few, more = (list(open_source(f"shop:visits/test?records={n}")) for n in (5, 9))
    assert few == more[:5] != list(open_source("shop:visits/train?records=5"))
    for visit in more:
        assert len(visit["history"]) == HISTORY == len(set(visit["history"])) and len(visit["shown"]) == SHOWN
        assert visit["bought"] in visit["shown"] and not set(visit["shown"]) & set(visit["history"])
        assert {*visit["history"], *visit["shown"]} <= known


@pytest.mark.slow
def test_a_phrase_means_one_of_eight_alone(goods: _Goods) -> None:
    rows = open_shop("references", "test", 0)
    for number in range(100):
        record = rows[number]
        assert len({record["photo"], *(other["photo"] for other in record["negatives"])}) == AMONG
        words = [named(goods.items[number], k) for k in (("category",), ("colour",), ("pattern",))]
        assert any(word.removesuffix("商品").removesuffix("的") in record["phrase"] for word in words)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(UsageError, match="no part 'item'.*items"):
        open_source("shop:item/train")
    with pytest.raises(UsageError, match="no split 'tst'"):
        open_source("shop:visits/tst")

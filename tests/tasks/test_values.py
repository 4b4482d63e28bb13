"""Colours and materials are read as whole words, and a text names those of its item alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.core.errors import DataError, UsageError
from openm6.tasks.values import LEXICON, OwnValues, Values

KNOWN = Values.load(closed=["云帆", "波西米亚", "简约风"])


def wrong(text: str, *titles: str, **cells: str) -> str:
    return OwnValues(KNOWN, cells.items(), titles).wrong(text)


@pytest.mark.parametrize(
    ("cells", "said", "told"),
    [
        # What no item has is known from the lexicon.
        ({}, "这条红色裙子", "红色"),
        ({}, "纯棉面料", "纯棉"),
        ({}, "一条红裙", "红裙"),
        ({"材质": "亚麻"}, "纯棉面料", "纯棉"),
        ({"材质": "亚麻"}, "亚麻面料", ""),
        # A shade may be called by its colour, a kind by its material, and not the other way.
        ({"颜色": "酒红色"}, "酒红裙子，红色耐看", ""),
        ({"颜色": "红色"}, "酒红色耐看", "酒红色"),
        ({"颜色": "粉红色"}, "红色耐看", "红色"),
        ({"材质": "头层牛皮"}, "真皮做成，牛皮耐用", ""),
        ({"材质": "二层牛皮"}, "头层牛皮", "头层牛皮"),
        ({"材质": "锦纶"}, "尼龙面料", ""),
        # Words are read whole.
        ({"材质": "仿羊绒"}, "羊绒围巾", "羊绒"),
        ({"材质": "仿羊绒"}, "仿羊绒围巾", ""),
        ({"材质": "不含羊毛"}, "羊毛围巾", "羊毛"),
        ({"材质": "涤棉"}, "棉质亲肤", "棉质"),
        ({"商品名": "网红同款"}, "红色耐看", "红色"),
        # In a column of colours 色 may be missing.
        ({"颜色": "红"}, "红色耐看，红裙子", ""),
        ({"颜色": "红/黑"}, "红色和黑色", ""),
        ({"颜色": "红黑拼色"}, "红色和黑色", ""),
        ({"颜色": "咖"}, "咖啡色耐看", ""),
        ({"Color": "红黑拼色"}, "红色和白色", "白色"),
        ({"颜色": "ＰＵ皮"}, "PU皮很软", ""),
        # Values of other items.
        ({}, "云帆出品", "云帆"),
        ({"品牌": "云帆旗舰"}, "云帆出品", ""),
        ({"风格": "简约风格"}, "波西米亚", "波西米亚"),
    ],
)
def test_a_text_names_what_its_item_has(cells: dict[str, str], said: str, told: str) -> None:
    assert wrong(said, **cells) == told


@pytest.mark.parametrize(
    "said",
    [
        "配一杯红酒，网红同款，生意红火，送红包。",
        "金属质感，金牌品质，资金，黄金周特惠，黄金比例。",
        "绿色食品，蓝牙，白天，黑科技，青春，粉丝。",
        "奶粉，面粉，银行，橙汁，咖啡，米饭，灰尘，紫外线。",
        "玻璃心，薅羊毛，羽毛球，真皮层，珍珠奶茶，皮肤，芝麻，棉花糖。",
        "出色，特色，角色，本色，各色，肤浅，白领，黑色素。",
    ],
)  # fmt: skip
def test_a_colour_or_material_inside_of_another_word_is_none(said: str) -> None:
    assert wrong(said) == ""


def test_a_title_gives_values_too() -> None:
    assert wrong("酒红色裙子", "新款酒红色连衣裙") == "" and wrong("黑色裙子", "新款酒红色连衣裙") == "黑色"


def test_a_text_that_goes_on_may_become_right() -> None:
    rule = OwnValues(KNOWN, [("材质", "仿羊绒"), ("认证", "绿色食品")])
    assert rule.wrong("白领", ended=False) == "" == rule.wrong("白领")
    assert rule.wrong("绿色", ended=False) == "" and rule.wrong("绿色") == "绿色"  # 绿色食品
    assert rule.wrong("绿色的", ended=False) == "绿色"
    assert rule.wrong("红色", ended=False) == "红色" and not rule.wrong("红色文化")
    assert rule.tail("这条绿色") == "绿色" and "食" in set(rule.follows("绿色"))


def test_a_lexicon_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("colours: {绯: }\nmaterials: {云锦: 妆花=妆花缎}\nothers: 云锦路", "utf-8")
    own = Values.load(file)
    assert OwnValues(own, [("材质", "妆花缎")]).wrong("云锦妆花，红色") == ""
    assert OwnValues(own, []).wrong("云锦路的绯色") == "绯色"
    for content in ("[1]", "colour: 红", "a: ["):
        file.write_text(content, "utf-8")
        with pytest.raises(DataError, match="words.yaml"):
            Values.load(file)
    with pytest.raises(UsageError, match="cannot be read"):
        Values.load(tmp_path / "none.yaml")


def test_the_lexicon_says_nothing_twice() -> None:
    """A word is a colour or a material, or neither, and no line repeats another's word."""
    import yaml

    content = yaml.safe_load(LEXICON.read_text("utf-8"))
    others = content["others"].split()
    assert len(others) == len(set(others)) and len(content["goods"].split()) == len(set(content["goods"].split()))
    for names in (content["colours"], content["materials"]):
        for kinds in names.values():
            words = str(kinds or "").split()
            assert len(words) == len(set(words))

"""Numbers are read whole in every form that merchants write, and nothing but the whole value may be said."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, strategies as st

from openm6.tasks.numbers import GivenNumbers, narrow, read_numbers

PRICES = """
1,299元        1299        | 2,599          2599        | 99.50          99.5        | ￥1 099         1099
¥1,299.00      1299        | １９９元       199         | １，２９９元   1299        | １，０９９．５０ 1099.5
1，299元       1299        | 12,999         12999       | 1,234,567元    1234567     | ￥1 234 567     1234567
0.99元         0.99        | 9.9包邮        9.9         | 99.90          99.9        | 199.00元        199
RMB299         299         | CNY 1,088.80   1088.8      | $19.99         19.99       | 1299.-          1299
1299元起       1299        | 约299元        299         | 到手价：359    359         | 【特价】49.9    49.9
1.2万          12000       | 1.2万元        12000       | 1万2           12000       | 1万2千          12000
3千元          3000        | 3千5           3500        | 12万           120000      | 5百块           500
1.5 万         15000       | 2亿            200000000   | １．２万       12000       | 1万零99         10099
一千二百九十九元 1299      | 两千元         2000        | 三百五         350         | 一百零五元      105
九块九         9.9         | 九十九元       99          | 十五元         15          | 一万二          12000
一九九元       199         | 贰佰元         200         | 一元           1           | 九十九点五元    99.5
8折            8折         | 八折           8折         | 8.5折          8.5折       | 八五折          8.5折
85折           8.5折       | ９折           9折         | 半价           5折         | 对折            5折
50%            50%         | ５０％         50%         | 百分之五十     50%         | 百分百          100%
2.5‰           2.5‰        | 两斤半         2.5         | 2斤半          2.5         | 半斤            0.5
1'299元        1299        | 1’099.50       1099.5      | 1, 299         1299        | 99。5          99.5
9。9折         9.9折       | ２。５万       25000       | 3万五          35000       | 1万两千八      12800
3千五百        3500        | 1.2w           1.2w        | 3K             3k          | 一块钱          1
"""
"""What stands in a cell, and its value."""

CELLS = [cell.rsplit(maxsplit=1) for line in PRICES.split("\n") if line for cell in line.split("|")]


def value_of(text: str) -> str:
    """Kind and value of the only number of a text, as the table writes them."""
    ((kind, value),) = [value for number in read_numbers(text) for value in number.values]
    return f"{value if isinstance(value, str) else format(value.normalize(), 'f')}{kind}"


@pytest.mark.parametrize(("cell", "value"), [(cell.strip(), value) for cell, value in CELLS])
def test_a_price_is_read_whole_and_said_whole(cell: str, value: str) -> None:
    assert value_of(cell) == value
    rule = GivenNumbers([cell])
    assert (
        not rule.wrong(f"现在只要{cell}，快来。") and not rule.wrong(f"只要{value}。") and not rule.wrong("没有数字。")
    )
    digits = "".join(re.findall(r"\d", unicodedata.normalize("NFKC", cell)))
    parts = {digits[a:b] for a in range(len(digits)) for b in range(a + 1, len(digits) + 1)}
    for part in parts:
        for said in (f"只要{part}元。", f"{part}折。", f"省{part}%。", f"{part}万。", f"{part}k。"):
            if value_of(said) != value:
                assert rule.wrong(said), said


def test_the_table_has_sixty_prices_and_more() -> None:
    assert len({cell.strip() for cell, _ in CELLS}) >= 60


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ("38,39,40", ["38", "39", "40"]),
        ("99元，299元", ["99", "299"]),
        ("8.8-9.5折", ["8.8折", "9.5折"]),
        ("8.98-12.98万", ["89800.00", "129800.00"]),
        ("2～3千元", ["2000", "3000"]),
        ("3千一件，三千一件，一百两件", ["3000", "3000", "100", "2"]),
        ("38, 39, 40", ["38", "39", "40"]),
        ("5kg，60W，4K屏", ["5", "60w", "4k"]),
        ("2024.11。11", ["2024.11.11"]),
        ("两块一件", ["2"]),
        ("满300减50", ["300", "50"]),
        ("2件8折，3件7折", ["2", "8折", "3", "7折"]),
        ("2024.11.11", ["2024.11.11"]),
        ("货号007", ["007"]),
        ("10㎡，②号，3m²", ["10", "3"]),
    ],
)
def test_several_numbers_of_a_cell(cell: str, values: list[str]) -> None:
    found = [f"{value}{kind}" for number in read_numbers(cell) for kind, value in number.values]
    assert found == values


EQUAL = [
    "1,299 1299 １２９９ 1，299.00 一千二百九十九元", "1.2万 12000 12,000 一万二", "八折 8折 8.0折 80折",
    "半价 5折 对折 五折", "50% 百分之五十 ５０％", "50 五十 50.0", "2.5 两斤半 2斤半",
]  # fmt: skip


def test_stated_forms_are_equal_and_no_unit_is_converted() -> None:
    groups = [line.split(" ") for line in EQUAL]
    for group in groups:
        for cell in group:
            for other in groups:
                for said in other:
                    assert bool(GivenNumbers([cell]).wrong(said)) == (other is not group), (cell, said)
    assert GivenNumbers(["1kg"]).wrong("1000克") and GivenNumbers(["五折"]).wrong("50%")


@pytest.mark.parametrize(
    "words",
    ["一条裙子，一件外套，百搭十分好看", "万能，统一，千万别错过，半身裙", "第一眼，四季，两用，半成品，一生一世"],
)
def test_words_are_no_numbers(words: str) -> None:
    assert read_numbers(words) == []


@pytest.mark.parametrize(
    "said", ["只要299元。", "只要1元。", "只要99元。", "只要12元。", "只要1，29元。", "只要1.299元。"]
)
def test_a_part_of_a_price_is_told(said: str) -> None:
    assert "which is not given" in GivenNumbers(["1,299元"]).wrong(said)


@pytest.mark.parametrize(
    ("cell", "said", "is_right"),
    [
        ("便携500ml", "现价500元。", False), ("便携500ml", "现价500。", False), ("便携500ml", "装500ml。", True),
        ("UPF50+", "只要50元。", False), ("第二件半价", "2元。", False), ("两斤半", "￥2.5。", False),
        ("续航40小时，199", "199元，续航40小时。", True), ("续航40小时，199", "40块。", False),
        ("9.9包邮", "9.9元。", True), ("1,299元", "到手只要一块。", False), ("1,299元", "送一块布。", True),
        ("RMB88，3件", "88元，3件。", True), ("299元3件", "3元。", False), ("两块五，2.5m", "2.5元。", True),
    ],
)  # fmt: skip
def test_a_measure_is_no_price(cell: str, said: str, is_right: bool) -> None:
    assert (not GivenNumbers([cell]).wrong(said)) is is_right


def test_numbers_alone_are_narrowed() -> None:
    assert narrow("全角，１，２９９．００元；Ａ款：红（大）") == "全角，1,299.00元；Ａ款：红（大）"
    assert narrow("只要９。９元。好。") == "只要9.9元。好。"


def in_chinese(number: int) -> str:
    """A number below ten million in Chinese numerals, by the rule of four places."""

    def four(n: int) -> str:
        text = ""
        for place, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
            digit = n // place % 10
            text += "零一二三四五六七八九"[digit] + name if digit else "零"
        return re.sub("零+", "零", text).strip("零")

    high, low = divmod(number, 10_000)
    joint = "零" if high and 0 < low < 1000 else ""
    return (four(high) + "万" if high else "") + joint + four(low)


@given(st.integers(1, 9_999_999), st.sampled_from(["{:d}", "{:,d}", "￥{:,d}.00", "{:d}元"]), st.booleans())
def test_every_spelling_of_a_number_is_the_number(number: int, form: str, is_wide: bool) -> None:
    text = form.format(number)
    if is_wide:
        text = text.translate({n: n + 0xFEE0 for n in range(33, 127)})
    assert value_of(text) == value_of(f"{in_chinese(number)}元") == str(number)


@given(st.text(st.sampled_from("0123456789,. ，．。'１千万百十零一二两点折%元块钱半件价xkg-"), max_size=14))
def test_what_is_said_as_it_is_given_is_right(text: str) -> None:
    assert not GivenNumbers([text]).wrong(text)
    for number in read_numbers(text):
        assert 0 <= number.start < number.end <= len(text)


@pytest.mark.parametrize("text", ["5kg的米", "60W灯", "8.98-12.98万的车", "9.9折，38, 39", "3万五，1,299元一块钱"])
def test_what_is_given_can_be_written_letter_by_letter(text: str) -> None:
    rule = GivenNumbers([text])
    for end in range(1, len(text)):
        assert not rule.wrong(text[:end], ended=False)
        if rule.wrong(text[:end]):
            assert text[end].casefold() in rule.follows(rule.tail(text[:end]))

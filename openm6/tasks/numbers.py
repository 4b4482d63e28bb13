"""Numbers in a text, each read whole, and the rule that a text has no numbers other than given ones.

A number is written with digits (1299), with separators between them (1,299; 1 299; 1'299; 99.50; with 。 for a point:
9。9), with a unit of Chinese numerals (1.2万, 1万二), in Chinese numerals (一千二百九十九), as a percentage (50%,
百分之五十) or as a discount (8.5折, 八五折, 85折, 半价). Digits may be full-width. Spellings of the same value are
equal: 1,299.00 = 1299, 1.2万 = 12000, 八折 = 8折. A discount, a percentage and any other number are never equal: 5折 is
neither 50% nor 5. A number with w or k after it (1.2w, 3k, 60W) equals itself alone: it may mean thousands or watts. A
number that is not money (500ml) is no price: it does not permit 500元. In a range the first number takes the unit of
the second: 8.98-12.98万 begins at 89,800.

A Chinese numeral is a number where it has a place value (十五, 三百) or a unit after it (三件, 八折, 九元), unlike
一条, 百搭, 十分, 万能."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

Value = tuple[str, Decimal | str]
"""Kind of a number ("" or one of % ‰ 折 w k) and its value; a text where it has none, such as version 1.5.2."""

_NUMERALS = {c: n % 10 for n, c in enumerate("零一二三四五六七八九〇壹贰叁肆伍陆柒捌玖")} | {"两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000, "万": 10_000, "亿": 100_000_000}
_MONEY, _COUNTED = "元块", "件只双条个片支枚粒颗瓶盒包袋箱罐桶套张层斤克公米寸年天月日号岁码级档倍成升毫厘英小"
"""First characters of units that make a single numeral a number."""

_N, _P, _U = "".join(_NUMERALS), "".join(_PLACES), _MONEY + _COUNTED
_SEPARATOR, _RANGE = "(?:,[ ]?|[ '’])", "-~–—至到"
_LITERAL = re.compile(
    rf"""(?P<percent>百分(?:之|(?=百)))?
    (?: (?:(?P<low>\d+(?:[.。]\d+)?)[ ]?[{_RANGE}]{{1,2}}[ ]?(?=\d+(?:[.。]\d+)?[ ]?[十百千万亿%‰折]))?
        (?P<digits>\d+(?:(?:,[ ]?|[ .。]|['’](?=\d{{3}}(?!\d)))\d+)*)
        (?P<places>[ ]?[十百千万亿]+ (?:[零〇]?(?:\d+[十百千万亿]*|[{_N}](?:[十百千万亿]+|(?![{_COUNTED}]))))*)?
      | (?P<chinese>(?:[{_N}{_P}]*[百千万亿](?=[{_N}][{_COUNTED}]) | [{_N}{_P}]+) (?:点[{_N}]+[{_P}]*)?) )
    (?:[ ]?(?P<kind>[%‰折])|(?P<letter>[wk])(?![a-z]))?
    (?: (?P<half>[{_U}]半(?![价折袖身])) | 块(?P<tenths>\d{{1,2}}|[{_N}])(?![\d{_N}{_P}{_U}]) )?
    | (?P<halved>半价|对折) | 半(?=[{_U}])(?!成品)""",
    re.VERBOSE,
)
_GROUPED = re.compile(rf"\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?:[.。]\d+)?")
_PRICE = re.compile("(?:[¥$价售仅]|只[要需])$")
_STARTS = rf"\d{_N}{_P}半对"
_MORE = f"{_N}{_P}{_U},. '’。毛钱点分之价%‰折半{_RANGE}{ascii_lowercase}"
_TAIL = re.compile(rf"[{_STARTS}][{_STARTS}{re.escape(_MORE)}]{{0,63}}$")


class _Plain(dict[int, str]):
    """Translation of each character to its plain form: NFKC and lower case, where that is one character. Signs made of
    digits, such as ² and ①, stay."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        plain = unicodedata.normalize("NFKC", character).casefold()
        self[code] = plain if len(plain) == 1 and unicodedata.category(character) != "No" else character
        return self[code]


_PLAIN = _Plain()


def plain(text: str) -> str:
    """The text in plain characters, one for each original: １，２９９ becomes 1,299."""
    return text.translate(_PLAIN)


def narrow(text: str) -> str:
    """The numbers of a text in plain characters with usual separators; the rest of the text is unchanged."""
    said, end = plain(text), 0
    parts: list[str] = []
    for number in read_numbers(text):
        parts += text[end : number.start], _spelled(said[number.start : number.end])
        end = number.end
    return "".join((*parts, text[end:]))


def _spelled(number: str) -> str:
    return re.sub("['’]", ",", number.replace("。", "."))


class Number(NamedTuple):
    """A number of a text, at its characters `start` to `end`. It has several values where separators stand between
    numbers, as in 38,39,40. `is_money`: by its sign or unit, unlike 500ml, 三件 or UPF50; None where nothing tells."""

    start: int
    end: int
    values: tuple[Value, ...]
    is_money: bool | None


def read_numbers(text: str) -> list[Number]:
    """All numbers of a text, from left to right."""
    said = plain(text)
    found = ((m, _values(m, said)) for m in _LITERAL.finditer(said))
    return [Number(m.start(), m.end(), values, _is_money(m, said)) for m, values in found if values]


def _is_money(found: re.Match[str], said: str) -> bool | None:
    behind, before = found["half"] or said[found.end() :].lstrip(" "), said[: found.start()].rstrip(" ")
    if found["tenths"] or behind[:1] in tuple(_MONEY) or re.search("(?:rmb|cny|usd|hkd)$", before):
        return True
    if re.match(f"(?!包邮)[a-z{_COUNTED}]", behind) or re.search("[a-z]$", before):
        return False
    return True if re.search("[¥$价]$", before) else None


def _values(found: re.Match[str], said: str) -> tuple[Value, ...]:
    """The values of a candidate for a number; empty if it is a word."""
    digits, low, places, chinese = ((found[n] or "").replace("。", ".") for n in ("digits", "low", "places", "chinese"))
    kind = found["kind"] or found["letter"] or ("%" if found["percent"] else "")
    if found["halved"]:
        return (("折", Decimal(5)),)
    if digits:
        *others, last = [digits] if _GROUPED.fullmatch(digits) else re.split(_SEPARATOR, digits)
        last = re.sub(_SEPARATOR, "", last)
        numbers = [*map(_decimal, others), _in_places(last + places) if places else _decimal(last)]
        if low:
            numbers.insert(0, _in_places(low + places) if places else _decimal(low))
    elif chinese:
        behind, is_price = said[found.end() : found.end() + 2], _PRICE.search(said, 0, found.start()) is not None
        if not (kind or found["half"] or found["tenths"] or _is_number(chinese, behind, is_price)):
            return ()
        numbers = [_in_places(chinese)]
    else:
        return (("", Decimal("0.5")),)
    if found["half"]:
        numbers = [n if isinstance(n, str) else n + Decimal("0.5") for n in numbers]
    if tenths := found["tenths"]:
        numbers = [n if isinstance(n, str) else n + Decimal(f"0.{_NUMERALS.get(tenths, tenths)}") for n in numbers]
    if kind == "折":
        numbers = [n / 10 if isinstance(n, Decimal) and 10 < n < 100 else n for n in numbers]
    # In a list the sign belongs to the last one, 7,8折, in a range to both.
    return tuple((kind if low or n == len(numbers) - 1 else "", number) for n, number in enumerate(numbers))


def _is_number(chinese: str, behind: str, is_price: bool) -> bool:
    if chinese[0] in _PLACES and _PLACES[chinese[0]] > 10:  # 百元, but not 百搭, 万一
        return behind != "" and behind[0] in _MONEY
    if len(chinese) > 1 and any(c in _PLACES for c in chinese):
        return True
    if chinese == "一" or behind == "毛钱":  # 一 is an article mostly, and 毛 hair
        return behind[:1] == "元" or behind in ("块钱", "毛钱") or (is_price and behind[:1] == "块")
    return behind != "" and behind[0] in _U


def _decimal(text: str) -> Decimal | str:
    """The value of digits with at most one point. Digits that begin with 0, as in a code, equal themselves alone."""
    if text.count(".") > 1 or re.match(r"0\d", text):
        return text
    return Decimal(text)


def _in_places(text: str) -> Decimal | str:
    """The value of numerals with place values: 1.2万, 一千二百九十九, 三百五 (350), 九十九点五. Without any they are
    digits one by one: 一九九. The text itself where it is no number."""
    whole, _, rest = text.partition("点")
    end = re.search(rf"[{_P}]*$", rest)
    if rest and end:
        digits = "".join(str(_NUMERALS[c]) for c in rest[: end.start()])
        before = _in_places(whole)
        return text if isinstance(before, str) else _times(before + Decimal(f"0.{digits}"), rest[end.start() :])
    if not any(c in _PLACES for c in text):
        return Decimal("".join(str(_NUMERALS[c]) for c in text))
    total = section = Decimal(0)
    last: Decimal | None = None
    place, filled = 0, False  # place of the last numeral, and whether 零 follows it
    for part in re.findall(rf"\d+(?:\.\d+)*|[{_N}{_P}]", text):
        if part in _PLACES:
            if _PLACES[part] >= 10_000:
                section += last or 0
                total = total * _PLACES[part] if total and not section else total + (section or 1) * _PLACES[part]
                section = Decimal(0)
            else:
                section += (Decimal(1) if last is None else last) * _PLACES[part]
            last, place, filled = None, _PLACES[part], False
        elif part in "零〇":
            filled = True
        elif last is not None:
            return text  # 三四十
        else:
            value = Decimal(_NUMERALS[part]) if part in _NUMERALS else _decimal(part)
            if isinstance(value, str):
                return text
            last = value
    if last is not None and place > 10 and not filled and last < 10:  # 三百五, 1万2
        last *= place // 10
    return total + section + (last or 0)


def _times(value: Decimal, places: str) -> Decimal:
    for place in places:
        value *= _PLACES[place]
    return value


class GivenNumbers:
    """The numbers of some texts, the only values that another text may have (a rule of tasks/constraints.py)."""

    following = frozenset(f"0123456789{_P}{_MORE}")

    def __init__(self, texts: Iterable[str]):
        every = [(plain(text), number) for text in texts for number in read_numbers(text)]
        self.values = frozenset(value for _, number in every for value in number.values)
        self._prices = frozenset(v for _, number in every if number.is_money is not False for v in number.values)
        # With the letters after it, so that 5k may become 5kg.
        self._given = frozenset(
            _spelled(text[n.start : n.end]) + re.split("(?![a-z])", text[n.end :], maxsplit=1)[0] for text, n in every
        )

    @cached_property
    def _spellings(self) -> tuple[str, ...]:
        """Spellings that the text may use for the values: those given, and those in digits."""
        found = set(self._given)
        for kind, value in self.values:
            if isinstance(value, str):
                continue
            value = value.normalize()
            found |= {f"{value:f}{kind}", f"{value:,f}{kind}"}
            if value >= 10_000 and not value % 100:
                found.add(f"{(value / 10_000).normalize():f}万{kind}")
            if kind == "折":
                found.add("".join("零一二三四五六七八九"[int(d)] for d in f"{value:f}" if d != ".") + kind)
        return tuple(found)

    @staticmethod
    def holds(word: str) -> bool:
        """Whether a number may begin in a word."""
        return re.search(f"[{_STARTS}]", plain(word)) is not None

    def tail(self, text: str) -> str:
        """The end of a text that looks like the beginning of a number; "" for none."""
        found = _TAIL.search(plain(text))
        return found[0] if found else ""

    def follows(self, tail: str) -> Iterable[str]:
        """Characters that may continue a number at the end."""
        return self.following if tail else ()

    def wrong(self, text: str, ended: bool = True) -> str:
        """The violation in a text; "" if there is none, or if the continuation of a text that has not `ended` may
        repair its last number."""
        said = plain(text)
        for number in read_numbers(text):
            if (self._prices if number.is_money else self.values).issuperset(number.values):
                continue
            rest = said[number.start :]
            if ended or not any(len(one) > len(rest) and one.startswith(rest) for one in self._spellings):
                return f"{text[number.start : number.end]}, which is not given"
        return ""

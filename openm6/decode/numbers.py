"""The numbers of a text, each read whole, and the rule that a text says no number but those that are given.

A number is written with digits (1299), with separators between them (1,299; 1 299; 99.50), with a unit of Chinese
numerals (1.2万, 3千), in Chinese numerals (一千二百九十九), as a percentage (50%, 百分之五十) or as a discount (8.5折,
八五折, 85折, 半价). Digits may be of full width. Spellings of the same value are equal: 1,299.00 = 1299, 1.2万 = 12000,
八折 = 8折. A discount, a percentage and any other number never equal each other: 5折 is neither 50% nor 5.

A Chinese numeral is a number where it has a place in it (十五, 三百) or a unit behind it (三件, 八折, 九元); it is none
in 一条, 百搭, 十分, 万能.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from functools import cached_property
from typing import NamedTuple

Value = tuple[str, Decimal | str]
"""The kind of a number ("", "%", "‰" or "折") and its value; a text where it has none, as the version 1.5.2 has."""

_NUMERALS = {c: n % 10 for n, c in enumerate("零一二三四五六七八九〇壹贰叁肆伍陆柒捌玖")} | {"两": 2}
_PLACES = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000, "万": 10_000, "亿": 100_000_000}
_MONEY, _COUNTED = "元块", "件只双条个片支枚粒颗瓶盒包袋箱罐桶套张层斤克公米寸年天月日号岁码级档倍成升毫厘英小"
"""The first characters of units that make one numeral a number."""

_N, _P, _U = "".join(_NUMERALS), "".join(_PLACES), _MONEY + _COUNTED
_LITERAL = re.compile(
    rf"""(?P<percent>百分(?:之|(?=百)))?
    (?: (?P<digits>\d+(?:[,. ]\d+)*) (?P<places>[ ]?[十百千万亿]+ (?:[零〇]?\d+[十百千万亿]*)*)?
      | (?P<chinese>[{_N}{_P}]+ (?:点[{_N}]+[{_P}]*)?) )
    (?:[ ]?(?P<kind>[%‰折]))?
    (?: (?P<half>[{_U}]半(?![价折袖身])) | 块(?P<tenths>\d{{1,2}}|[{_N}])(?![\d{_N}{_P}{_U}]) )?
    | (?P<halved>半价|对折) | 半(?=[{_U}])(?!成品)""",
    re.VERBOSE,
)
_GROUPED = re.compile(r"\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?")
_STARTS = rf"\d{_N}{_P}半对"
_TAIL = re.compile(rf"[{_STARTS}][{_STARTS}{_U},. 点分之价%‰折]{{0,63}}$")


class _Plain(dict[int, str]):
    """Each character in its plain form: NFKC and small letters, where that is one character. Signs made of digits, as
    ² and ①, are no digits and stay."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        plain = unicodedata.normalize("NFKC", character).casefold()
        self[code] = plain if len(plain) == 1 and unicodedata.category(character) != "No" else character
        return self[code]


_PLAIN = _Plain()


def plain(text: str) -> str:
    """The text in plain characters, one for each of its own: １，２９９ becomes 1,299."""
    return text.translate(_PLAIN)


def narrow(text: str) -> str:
    """The text with its numbers, and nothing else, in plain characters."""
    said, end = plain(text), 0
    parts: list[str] = []
    for number in read_numbers(text):
        parts += text[end : number.start], said[number.start : number.end]
        end = number.end
    return "".join((*parts, text[end:]))


class Number(NamedTuple):
    """A number of a text, at the characters `start` to `end` of it. It has several values where separators stand
    between numbers, as in 38,39,40."""

    start: int
    end: int
    values: tuple[Value, ...]


def read_numbers(text: str) -> list[Number]:
    """All numbers of a text, from left to right."""
    said = plain(text)
    return [Number(m.start(), m.end(), values) for m in _LITERAL.finditer(said) if (values := _values(m, said))]


def _values(found: re.Match[str], said: str) -> tuple[Value, ...]:
    """The values of what looks like a number; none if it is a word."""
    digits, chinese, places = found["digits"], found["chinese"], found["places"]
    kind = found["kind"] or ("%" if found["percent"] else "")
    if found["halved"]:
        return (("折", Decimal(5)),)
    if digits:
        *others, last = [digits] if _GROUPED.fullmatch(digits) else re.split("[, ]", digits)
        last = re.sub("[, ]", "", last)
        numbers = [*map(_decimal, others), _in_places(last + places) if places else _decimal(last)]
    elif chinese:
        if not (kind or found["half"] or found["tenths"] or _is_number(chinese, said[found.end() : found.end() + 1])):
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
    # In a list the sign belongs to the last one: 7,8折.
    return tuple((kind if n == len(numbers) - 1 else "", number) for n, number in enumerate(numbers))


def _is_number(chinese: str, behind: str) -> bool:
    if chinese[0] in _PLACES and _PLACES[chinese[0]] > 10:  # 百元, but not 百搭, 万一
        return behind != "" and behind in _MONEY
    if len(chinese) > 1 and any(c in _PLACES for c in chinese):
        return True
    return behind != "" and behind in (_MONEY[:1] if chinese == "一" else _U)  # 一 is an article mostly


def _decimal(text: str) -> Decimal | str:
    """The value of digits with one point at most. Digits that begin with 0, as in a code, equal themselves alone."""
    if text.count(".") > 1 or re.match(r"0\d", text):
        return text
    return Decimal(text)


def _in_places(text: str) -> Decimal | str:
    """The value of numerals with places: 1.2万, 一千二百九十九, 三百五 (350), 九十九点五. Without any place they are
    digits one by one: 一九九. Of what is no number the text."""
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
    place, filled = 0, False  # of the last one, and whether 零 stands behind it
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
    """The numbers of some texts: another text may say these values and no others (a rule of decode/limits.py)."""

    following = frozenset(f"0123456789{_N}{_P}{_U},. 点分之价%‰折半")

    def __init__(self, texts: Iterable[str]):
        every = [(plain(text), number) for text in texts for number in read_numbers(text)]
        self.values = frozenset(value for _, number in every for value in number.values)
        self._given = frozenset(text[number.start : number.end] for text, number in every)

    @cached_property
    def _spellings(self) -> tuple[str, ...]:
        """The spellings that the text may use for the values: those given, and those in digits."""
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
        """The end of a text that looks like a number begun; "" for none."""
        found = _TAIL.search(plain(text))
        return found[0] if found else ""

    def follows(self, tail: str) -> Iterable[str]:
        """The characters that a number at the end may go on with."""
        return self.following if tail else ()

    def wrong(self, text: str, ended: bool = True) -> str:
        """What is wrong with a text; "" if nothing is. If it has not `ended`, what is left may put its last number
        right."""
        said = plain(text)
        for number in read_numbers(text):
            if self.values.issuperset(number.values):
                continue
            rest = said[number.start :]
            if ended or not any(len(one) > len(rest) and one.startswith(rest) for one in self._spellings):
                return f"{text[number.start : number.end]}, which is not given"
        return ""

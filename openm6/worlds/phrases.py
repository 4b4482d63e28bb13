"""The Chinese texts of the demo catalogue: captions, questions with answers, titles, slogans, sentences.

Every caption names the colour, the pattern and the category of every item, each once: `attributes_in` parses them, to
judge whether an answer is right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, Item

MEASURES = {
    "连衣裙": "条", "T恤": "件", "裤子": "条", "帽子": "顶", "鞋": "只", "包": "个", "杯子": "个", "雨伞": "把",
}  # fmt: skip
OPPOSITE = {"左边": "右边", "右边": "左边", "上面": "下面", "下面": "上面"}

Attributes = dict[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """A question; `kind` is the attribute asked for, `detail` the way to refer to the item: alone, named, placed, pair,
    all."""

    question: str
    answer: str
    kind: str
    detail: str


_ONE = (
    "一{m}{c}{p}{k}。",
    "图中是一{m}{c}的{p}{k}。",
    "这是一{m}{p}图案的{c}{k}。",
    "图片里有一{m}{k}，颜色是{c}，图案是{p}。",
    "{c}的{k}，{p}款。",
    "照片中的{k}是{c}的，上面是{p}图案。",
    "画面里放着一{m}{p}的{c}{k}。",
    "这{m}{k}的颜色为{c}，样式为{p}。",
)
_NOUNS = ("一{m}{c}{p}{k}", "一{m}{c}的{p}{k}", "一{m}{p}的{c}{k}", "{c}{p}{k}", "{c}的{p}{k}", "{p}图案的{c}{k}")
# a stands on side r of b; o is the opposite of r.
_TWO = (
    "{a}在{b}的{r}。",
    "图中{b}的{r}是{a}。",
    "{r}是{a}，{o}是{b}。",
    "图片里有两件商品：{r}的是{a}，{o}的是{b}。",
    "画面中{a}放在{b}的{r}。",
    "两件商品，{a}和{b}，前者在后者的{r}。",
    "图中有{a}，它的{o}是{b}。",
    "{o}放着{b}，{r}放着{a}。",
)

_COLOUR = (
    "图中的商品是什么颜色？",
    "这件商品是什么颜色的？",
    "商品的颜色是什么？",
    "请问它是什么颜色？",
    "图里的{k}是什么颜色？",
)
_CATEGORY = (
    "这是什么商品？",
    "图中的商品是什么？",
    "图片里的商品属于哪一类？",
    "图里有什么？",
    "图中{c}的商品是什么？",
)
_PATTERN = (
    "什么图案？",
    "图中的商品是什么图案？",
    "这件商品上是什么图案？",
    "商品的图案是哪一种？",
    "图里的{k}是什么图案？",
)
_COUNT = ("图里有几件商品？", "图中一共有多少件商品？", "画面里有几件商品？", "请数一数，有几件商品？")
_COLOUR_OF = ("{x}是什么颜色？", "{x}是什么颜色的？", "图中{x}的颜色是什么？", "请问{x}是什么颜色？")
_CATEGORY_OF = ("{x}是什么？", "{x}是什么商品？", "图中{x}是什么？", "{x}属于哪一类？")
_PATTERN_OF = ("{x}是什么图案？", "{x}上是什么图案？", "图中{x}的图案是哪一种？", "请问{x}是什么图案？")
_WHERE = (
    "{a}在{b}的哪边？",
    "{a}在{b}的哪一边？",
    "{a}位于{b}的什么位置？",
    "相对于{b}，{a}在哪边？",
    "图中{a}在{b}的哪边？",
)

_TITLES = ("{c}{p}{k}", "{p}{c}{k} 新款", "新款{c}{p}{k}", "{c}{p}{k} 百搭", "简约{p}{c}{k}", "{k} {c} {p}")
_MOODS = {
    "红": "热情", "橙": "活力", "黄": "明亮", "绿": "清新", "蓝": "沉静", "紫": "优雅", "粉": "甜美", "黑": "经典",
}  # fmt: skip
_USES = {
    "连衣裙": "穿出好身姿", "T恤": "轻松每一天", "裤子": "走路都带风", "帽子": "遮阳又好看",
    "鞋": "步步都舒服", "包": "装下好心情", "杯子": "喝水也开心", "雨伞": "下雨也不怕",
}  # fmt: skip
_SLOGANS = (
    "{mood}的{c}{p}{k}，{use}。",
    "{c}{p}{k}:{use}!",
    "{use}，就选{c}{p}{k}。",
    "{p}遇上{c}，{mood}{k}，{use}。",
    "一{m}{c}{p}{k}，{mood}一整天。",
    "爱{mood}的你，值得拥有这{m}{c}{p}{k}。",
)
_SENTENCES = (
    "我买了一{m}{c}{p}{k}。",
    "妈妈送给我一{m}{c}的{p}{k}。",
    "店里的{c}{p}{k}卖得很好。",
    "她今天选了一{m}{p}图案的{c}{k}。",
    "这{m}{k}有{c}的，也可以看看{p}的。",
    "朋友说那{m}{c}{p}{k}很{mood}。",
    "桌上放着一{m}{c}的{k}，图案是{p}。",
    "我最喜欢{mood}的{c}，所以挑了这{m}{p}{k}。",
)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _fill(template: str, item: Item) -> str:
    return template.format(
        m=MEASURES[item.category], c=item.colour + "色", p=item.pattern, k=item.category,
        mood=_MOODS[item.colour], use=_USES[item.category],
    )  # fmt: skip


def captions(items: tuple[Item, ...], relation: str, rng: np.random.Generator) -> list[str]:
    """Six different captions. With two items, the first stands on side `relation` of the second."""
    if len(items) == 1:
        return [_fill(_ONE[i], items[0]) for i in rng.permutation(len(_ONE))[:6]]
    written = []
    for i in rng.permutation(len(_TWO))[:6]:
        first, second = items if rng.integers(2) else items[::-1]
        side = relation if first is items[0] else OPPOSITE[relation]
        a, b = _fill(_pick(_NOUNS, rng), first), _fill(_pick(_NOUNS, rng), second)
        written.append(_TWO[i].format(a=a, b=b, r=side, o=OPPOSITE[side]))
    return written


def questions(items: tuple[Item, ...], relation: str, rng: np.random.Generator) -> Iterator[Question]:
    """Questions about one picture: four for one item, eight for two."""

    def ask(template: str, answer: str, kind: str, detail: str) -> Question:
        # People type the Chinese question mark, the ASCII one, or none.
        mark = ("\uff1f", "\uff1f", "?", "")[int(rng.integers(4))]
        return Question(template[:-1] + mark, answer, kind, detail)

    yield ask(_pick(_COUNT, rng), "两件" if len(items) == 2 else "一件", "count", "all")
    if len(items) == 1:
        for choices, kind in ((_COLOUR, "colour"), (_CATEGORY, "category"), (_PATTERN, "pattern")):
            yield ask(_fill(_pick(choices, rng), items[0]), answer_of(items[0], kind), kind, "alone")
        return
    sides = (relation, OPPOSITE[relation])
    for number in (0, 1):
        names = [_referred(item, items, rng) for item in items]
        where = _pick(_WHERE, rng).format(a=names[number], b=names[1 - number])
        yield ask(where, sides[number], "relation", "pair")
        placed = sides[number] + "的商品"
        yield ask(_pick(_CATEGORY_OF, rng).format(x=placed), items[number].category, "category", "placed")
    for kind, templates in (("colour", _COLOUR_OF), ("pattern", _PATTERN_OF)):
        for number in (0, 1):
            # By the item's name or by its place.
            named = bool(rng.integers(2))
            x = items[number].category if named else sides[number] + "的商品"
            answer = answer_of(items[number], kind)
            yield ask(_pick(templates, rng).format(x=x), answer, kind, "named" if named else "placed")


def answer_of(item: Item, kind: str) -> str:
    """The short answer to a question of this kind about one item."""
    return {"colour": item.colour + "色", "category": item.category, "pattern": item.pattern}[kind]


def _referred(item: Item, items: tuple[Item, ...], rng: np.random.Generator) -> str:
    """A phrase that refers to one of two items (their categories differ)."""
    choice = rng.integers(3)
    if choice == 0:
        return item.category
    return f"{item.colour}色的{item.category}" if choice == 1 else f"{item.colour}色{item.category}"


def title(items: tuple[Item, ...], rng: np.random.Generator) -> str:
    if len(items) == 1:
        return _fill(_pick(_TITLES, rng), items[0])
    first, second = (_fill("{c}{p}{k}", item) for item in items)
    return f"{first}和{second}两件套"


def slogan(items: tuple[Item, ...], rng: np.random.Generator) -> str:
    if len(items) == 1:
        return _fill(_pick(_SLOGANS, rng), items[0])
    first, second = (_fill("{c}{p}{k}", item) for item in items)
    return f"{first}配{second}，一次带走好心情。"


def sentence(item: Item, rng: np.random.Generator) -> str:
    return _fill(_pick(_SENTENCES, rng), item)


def table(items: tuple[Item, ...]) -> list[Attributes]:
    """The attribute table: one row an item."""
    return [{"品类": i.category, "颜色": i.colour + "色", "图案": i.pattern} for i in items]


_NAMES: dict[str, tuple[str, str]] = {
    **{name: ("category", name) for name in CATEGORIES},
    **{name + "色": ("colour", name) for name in COLOURS},
    **{name: ("pattern", name) for name in PATTERNS},
}
_NAME = re.compile("|".join(_NAMES))


def attributes_in(text: str) -> list[Attributes]:
    """The items named in a text, in order, each with its category, colour and pattern, where present.

    Attributes belong together until one of a kind comes a second time: `红色条纹连衣裙在蓝色圆点帽子的左边` is
    `[{colour: 红, pattern: 条纹, category: 连衣裙}, {colour: 蓝, ...}]`."""
    found: list[Attributes] = []
    for match in _NAME.finditer(text):
        kind, name = _NAMES[match[0]]
        if not found or kind in found[-1]:
            found.append({})
        found[-1][kind] = name
    return found


def same_attributes(text: str, reference: str) -> bool:
    """Whether a caption names the same items with the same attributes as a reference, in any order."""

    def key(found: list[Attributes]) -> list[tuple[tuple[str, str], ...]]:
        return sorted(tuple(sorted(item.items())) for item in found)

    return key(attributes_in(text)) == key(attributes_in(reference))

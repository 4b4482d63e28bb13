"""Pairs of texts: entailment and similarity."""

from __future__ import annotations

from dataclasses import replace

from openm6.data.store import Record
from openm6.worlds.draw import COLOURS, PATTERNS
from openm6.worlds.market.goods import CATEGORIES, STYLES, Goods, make_goods
from openm6.worlds.market.wording import Wording

_PREMISES = (
    "{b}的这{m}{k}是{c}的，用{s}做成，卖{y}。",
    "店里有一{m}{s}{k}，颜色是{c}，牌子是{b}，价格{y}。",
    "她花{y}买了一{m}{b}{k}，{c}，{s}的。",
    "这{m}{c}{k}来自{b}，材质是{s}，标价{y}。",
    "{b}新出了{c}的{s}{k}，一{m}{y}。",
)
_HYPOTHESES: dict[str, tuple[str, ...]] = {
    "colour": ("{k}是{c}的。", "这{m}{k}的颜色是{c}。", "它是{c}的。", "这件商品是{c}。", "有一{m}{c}的{k}。"),
    "material": ("{k}是{s}做的。", "材质是{s}。", "它用{s}做成。", "这{m}{k}的料子是{s}。", "有一{m}{s}的{k}。"),
    "brand": ("{k}是{b}的。", "牌子是{b}。", "它来自{b}。", "这{m}{k}由{b}出品。", "{b}卖这样的{k}。"),
}
_CHEAP = ("价格不到{n}元。", "它比{n}元便宜。", "{n}元可以买到它。", "买它用不了{n}元。", "标价低于{n}元。")
_UNTOLD = {
    "style": ("风格是{f}的。", "它走{f}路线。", "样子偏{f}。", "这{m}{k}属于{f}风格。", "看上去很{f}。"),
    "season": ("它适合{j}。", "这是{j}的款式。", "{j}用它正好。", "这{m}{k}是为{j}准备的。", "到了{j}才用它。"),
    "pattern": ("上面是{p}。", "图案是{p}。", "它带有{p}。", "这{m}{k}的花样是{p}。", "能看到{p}的图案。"),
}


def entailment(w: Wording) -> Record:
    """premise, hypothesis, label: 蕴含 (it follows), 矛盾 (it cannot be), 无关 (nothing is said of it)."""
    goods = make_goods(w)
    label = w.one(("蕴含", "矛盾", "无关"))
    if label == "无关":
        hypothesis = w.say(_UNTOLD[w.one(list(_UNTOLD))], **goods.words())
    elif w.chance(0.25):
        near = w.number(10, 80)
        limit = goods.price + near if label == "蕴含" else max(1, goods.price - near)
        hypothesis = w.say(_CHEAP, n=limit)
    else:
        name = w.one(list(_HYPOTHESES))
        said = goods
        while label == "矛盾" and getattr(said, name) == getattr(goods, name):
            said = replace(goods, **{name: getattr(make_goods(w), name)})
        hypothesis = w.say(_HYPOTHESES[name], **said.words())
    return {"premise": w.say(_PREMISES, **goods.words()), "hypothesis": hypothesis, "label": label}


_DESCRIBED = (
    "{f}的{c}{p}{k}",
    "{c}{k}，{p}图案，{f}风格",
    "一{m}{p}的{c}{k}，样子{f}",
    "{k}：{c}、{p}、{f}",
    "{f}款{k}，{c}配{p}",
    "{p}{k}，{c}，{f}",
    "{c}的{p}{k}，走{f}路线",
    "想买一{m}{f}的{k}，{c}，{p}的",
    "{f}{p}{k}，颜色要{c}",
    "有{p}的{f}{k}，{c}的",
)


def similar(w: Wording) -> Record:
    """first, second: two descriptions; label: the number of category, colour, pattern and style in which they agree, 0
    to 4."""
    goods = make_goods(w)
    label = w.number(0, 4)
    others = {
        "category": tuple(CATEGORIES),
        "colour": tuple(c + "色" for c in COLOURS),
        "pattern": PATTERNS,
        "style": STYLES,
    }
    changed = w.some(list(others), 4 - label)
    values = {name: w.one([o for o in others[name] if o != getattr(goods, name)]) for name in changed}
    other: Goods = replace(goods, **values)  # type: ignore[arg-type]
    return {
        "first": w.say(_DESCRIBED, **goods.words()),
        "second": w.say(_DESCRIBED, **other.words()),
        "label": str(label),
    }

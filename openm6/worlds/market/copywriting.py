"""Texts from a table of attributes: copy, a slogan with its second line, a plain text; and speech of a live sale, as a
speech recognizer writes it down, with the script made of it."""

from __future__ import annotations

from openm6.data.store import Record
from openm6.worlds.market.goods import COLUMNS, Goods, make_goods
from openm6.worlds.market.wording import Wording

_OPENINGS = (
    "这{m}{b}{k}选用{s}，{t}，{v}。",
    "{b}新款{k}，{s}做成，{t}又{v}。",
    "喜欢{s}的人看过来：{b}{k}，{t}，{v}。",
    "一{m}好{k}，先看用料。{b}用的是{s}，{t}，{v}。",
    "{s}{k}来自{b}，{v}，{t}。",
)
_LOOKS = (
    "{c}配{p}，{f}耐看。",
    "颜色是{c}，图案是{p}，整体{f}。",
    "{p}落在{c}上，{f}又大方。",
    "{f}的设计，{c}{p}，怎么配都好看。",
    "一眼看去是{c}，细看有{p}，{f}得刚刚好。",
)
_CLOSINGS = (
    "{j}用它，{u}，只要{y}。",
    "适合{j}，{u}，现价{y}。",
    "{y}就能带走，{j}里{u}。",
    "{u}，{j}不能少，价格{y}。",
    "到了{j}，有它{u}，才{y}。",
)
_SLOGANS = (
    ("{c}{k}，{u}", "{s}{t}，{y}带回家"),
    ("{f}{k}，就要{c}", "{b}{s}，{t}"),
    ("{u}，从{b}{k}开始", "{c}{p}，{j}正合适"),
    ("这个{j}，选{c}{k}", "{s}{v}，{u}"),
    ("{b}{k}，{t}", "{f}{p}，只要{y}"),
)
_TELLS = {
    "brand": ("由{b}出品", "品牌是{b}", "来自{b}", "由{b}生产", "是{b}的产品"),
    "colour": ("颜色为{c}", "是{c}的", "外表是{c}", "以{c}为主", "采用{c}"),
    "pattern": ("图案为{p}", "带有{p}图案", "上面是{p}", "花样是{p}", "用了{p}的花样"),
    "material": ("由{s}制成", "材质为{s}", "用{s}做成", "面料是{s}", "主要用料是{s}"),
    "style": ("风格{f}", "属于{f}风格", "走{f}路线", "样子{f}", "整体偏{f}"),
    "season": ("适合{j}使用", "在{j}用正好", "专为{j}准备", "{j}最合适", "是{j}的款式"),
    "price": ("售价{y}", "价格是{y}", "卖{y}", "标价{y}", "只要{y}"),
}
_THIS = ("这{m}{k}", "该{k}", "这款{k}", "此{k}", "这一{m}{k}")


def copy(w: Wording) -> Record:
    """attributes (all eight), copy (three sentences), slogan, subtitle."""
    goods = make_goods(w)
    words = goods.words()
    slogan, subtitle = w.one(_SLOGANS)
    return {
        "attributes": [_shuffled(w, goods)],
        "copy": [_copy(w, words) for _ in range(3)],
        "slogan": slogan.format(**words),
        "subtitle": subtitle.format(**words),
    }


def _copy(w: Wording, words: dict[str, str]) -> str:
    return "".join(w.one(part).format(**words) for part in (_OPENINGS, _LOOKS, _CLOSINGS))


def facts(w: Wording) -> Record:
    """attributes (the category and three to six others) and text, a sentence or two that states each of them once."""
    goods = make_goods(w)
    chosen = w.some(list(_TELLS), w.number(3, 6))
    row = goods.row("category", *chosen)
    return {
        "attributes": [{name: row[name] for name in w.some(list(row), len(row))}],
        "text": [_told(w, goods, chosen) for _ in range(3)],
    }


def _told(w: Wording, goods: Goods, attributes: list[str]) -> str:
    """The attributes in the order of `COLUMNS`, so that texts of the same facts differ in wording alone."""
    words = goods.words()
    parts = [w.one(_TELLS[name]).format(**words) for name in COLUMNS if name in attributes]
    return w.one(_THIS).format(**words) + "，".join(parts) + "。"


_FILLERS = ("嗯", "啊", "那个", "这个", "就是说", "然后呢", "对吧", "哈", "呢", "怎么说呢")
_CALLS = ("家人们", "姐妹们", "朋友们", "各位", "大家")
_SPOKEN = {
    "brand": ("这个是{b}家的", "牌子呢是{b}", "{b}这个牌子大家都知道", "是{b}出的", "我们今天讲的是{b}的"),
    "material": ("料子用的是{s}", "{s}的料子", "它是{s}做的", "用料是{s}", "摸起来就知道是{s}"),
    "merits": ("{t}{v}", "真的是{t}还{v}", "{v}而且{t}", "特点就是{t}{v}", "用过的都说{t}{v}"),
    "colour": ("颜色是{c}", "给大家看这个{c}", "{c}特别好看", "拿在手里的是{c}", "今天到货的是{c}"),
    "pattern": ("上面是{p}的", "花样是{p}", "{p}的图案", "大家看这个{p}", "做的是{p}"),
    "use": ("买回去{u}", "有了它{u}", "你会发现{u}", "可以说是{u}", "保证你{u}"),
}
_WRITTEN = {
    "brand": "来自{b}。",
    "material": "选用{s}，",
    "merits": "{t}，{v}。",
    "colour": "颜色是{c}，",
    "pattern": "图案是{p}。",
    "use": "{u}。",
}


def live(w: Wording) -> Record:
    """asr: speech of a host, without punctuation, with fillers, repeated words and a corrected price; script: the clean
    text, in a fixed order; attributes: the facts."""
    goods = make_goods(w)
    words = goods.words()
    told = [name for name in _SPOKEN if name in ("colour", "merits") or w.chance(0.75)]
    before, wrong = goods.price + w.number(3, 20) * 10, goods.price + w.number(1, 9)
    parts = [w.say(_SPOKEN[name], **words) for name in w.some(told, len(told))]
    corrected = w.chance(0.3)
    price = f"{wrong}不对说错了是{goods.price}元" if corrected else f"{goods.price}元"
    parts.append(w.say(_OFFERS, o=before, n=price))
    greeting = w.say(_GREETINGS, a=w.one(_CALLS), **words)
    asr = "".join(_hesitant(w, part) for part in (greeting, *parts))
    written = "".join(_WRITTEN[name] for name in _SPOKEN if name in told).rstrip("，。")
    script = f"大家好，今天带来一{{m}}{{k}}。{written}。原价{before}元，现在只要{{y}}。".format(**words)
    return {"asr": asr, "script": script, "attributes": [goods.row()]}


_GREETINGS = (
    "{a}好今天给大家带来一{m}{k}",
    "{a}晚上好我们来看这{m}{k}",
    "来了来了{a}看这{m}{k}",
    "{a}今天第一件是这{m}{k}",
    "{a}你们要的{k}到了",
)
_OFFERS = (
    "原价{o}元今天直播间只要{n}",
    "平时卖{o}元现在{n}就给你",
    "价格呢原来是{o}元今天{n}",
    "店里{o}元这里{n}",
    "别的地方{o}元我们今天只收{n}",
)


def _hesitant(w: Wording, part: str) -> str:
    """The text, sometimes after a filler, or with its first or last two characters repeated."""
    if w.chance(0.5):
        part = w.one(_FILLERS) + part
    if w.chance(0.25) and not part[-1].isascii():
        part = part + part[-2:]
    return part if not w.chance(0.2) else part[:2] + part


def _shuffled(w: Wording, goods: Goods) -> dict[str, str]:
    row = goods.row()
    return {name: row[name] for name in w.some(list(row), len(row))}

"""Goods with eight attributes, and the combinations that no training record shows."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

from openm6.worlds.draw import COLOURS, PATTERNS, Item
from openm6.worlds.market.wording import Wording
from openm6.worlds.pictured import HELD_OUT

CATEGORIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "连衣裙": ("条", ("纯棉", "真丝", "亚麻", "牛仔"), "穿出好身材"),
    "T恤": ("件", ("纯棉", "亚麻", "真丝"), "每天都轻松"),
    "衬衫": ("件", ("纯棉", "真丝", "亚麻", "牛仔"), "上班出游都得体"),
    "外套": ("件", ("羊毛", "牛仔", "尼龙", "真皮"), "早晚都不冷"),
    "毛衣": ("件", ("羊毛", "羊绒", "纯棉"), "冷天也温暖"),
    "裤子": ("条", ("纯棉", "牛仔", "亚麻", "羊毛"), "走路都带风"),
    "半身裙": ("条", ("真丝", "牛仔", "亚麻", "纯棉"), "一转身就好看"),
    "帽子": ("顶", ("纯棉", "羊毛", "帆布"), "遮阳又好看"),
    "围巾": ("条", ("羊毛", "羊绒", "真丝", "纯棉"), "围上就有精神"),
    "手套": ("双", ("羊毛", "羊绒", "真皮"), "双手不再冷"),
    "袜子": ("双", ("纯棉", "羊毛", "羊绒"), "双脚整天舒服"),
    "鞋": ("双", ("真皮", "帆布", "麂皮", "尼龙"), "步步都舒服"),
    "凉鞋": ("双", ("真皮", "尼龙", "帆布"), "夏天不闷脚"),
    "靴子": ("双", ("真皮", "麂皮", "尼龙"), "雨雪天也不怕"),
    "包": ("个", ("真皮", "帆布", "尼龙", "麂皮"), "装下好心情"),
    "书包": ("个", ("帆布", "尼龙", "真皮"), "背着不累肩"),
    "钱包": ("个", ("真皮", "帆布", "麂皮"), "小巧不占地方"),
    "杯子": ("个", ("陶瓷", "玻璃", "不锈钢"), "喝水也开心"),
    "水壶": ("个", ("陶瓷", "玻璃", "不锈钢"), "出门带着放心"),
    "雨伞": ("把", ("尼龙", "帆布", "真丝"), "下雨也不怕"),
    "台灯": ("盏", ("陶瓷", "玻璃", "竹木"), "夜里读书不伤眼"),
    "靠垫": ("个", ("纯棉", "亚麻", "麂皮"), "坐久了也不累"),
    "毯子": ("条", ("纯棉", "羊毛", "羊绒"), "盖上一觉到天亮"),
    "餐盘": ("个", ("陶瓷", "玻璃", "竹木"), "吃饭也有好心情"),
}
"""Category: its measure word, its possible materials, and its uses."""

MERITS: dict[str, tuple[str, str]] = {
    "纯棉": ("柔软亲肤", "吸汗透气"), "真丝": ("轻薄顺滑", "光泽细腻"), "亚麻": ("挺括凉爽", "透气不闷"),
    "羊毛": ("厚实保暖", "蓬松柔软"), "羊绒": ("轻暖细软", "贴身不扎"), "牛仔": ("耐磨耐穿", "越洗越好看"),
    "真皮": ("质感十足", "越用越亮"), "帆布": ("结实耐用", "轻便百搭"), "尼龙": ("轻便防水", "容易打理"),
    "麂皮": ("手感细腻", "复古有型"), "陶瓷": ("温润细腻", "耐热好洗"), "玻璃": ("通透好看", "不留异味"),
    "不锈钢": ("结实耐摔", "保温持久"), "竹木": ("天然环保", "纹理清晰"),
}  # fmt: skip

STYLES = ("简约", "复古", "休闲", "优雅", "运动", "甜美")
SEASONS = ("春季", "夏季", "秋季", "冬季")
_FIRST, _SECOND = "云青星海松金玉风明远兰安", "帆禾桥石川叶舟塔湾岭竹溪"

COLUMNS = {
    "brand": "品牌", "category": "品类", "colour": "颜色", "pattern": "图案", "material": "材质", "style": "风格",
    "season": "季节", "price": "价格",
}  # fmt: skip
"""Attribute of `Goods`: its column in tables."""


@dataclass(frozen=True, slots=True)
class Goods:
    brand: str
    category: str
    colour: str
    pattern: str
    material: str
    style: str
    season: str
    price: int

    @property
    def measure(self) -> str:
        return CATEGORIES[self.category][0]

    @property
    def use(self) -> str:
        return CATEGORIES[self.category][2]

    @property
    def merits(self) -> tuple[str, str]:
        return MERITS[self.material]

    def value(self, attribute: str) -> str:
        return f"{self.price}元" if attribute == "price" else str(getattr(self, attribute))

    def words(self) -> dict[str, str]:
        """For wordings: b brand, k category, c colour, p pattern, s material, f style, j season, y price, m measure
        word, u use, t and v merits."""
        names = dict(zip("bkcpsfjy", COLUMNS, strict=True))
        merits = dict(zip("tv", self.merits, strict=True))
        return {**{letter: self.value(name) for letter, name in names.items()}, "m": self.measure, "u": self.use,
                **merits}  # fmt: skip

    def row(self, *attributes: str) -> dict[str, str]:
        """These attributes, or all, as the row of a table."""
        return {COLUMNS[name]: self.value(name) for name in attributes or COLUMNS}


def is_held_out(goods: Goods) -> bool:
    """Whether no training record has this category in this colour and material, or this colour and pattern."""
    known = Item(goods.category, goods.colour.removesuffix("色"), goods.pattern)
    return zlib.crc32(f"{goods.category}{goods.colour}{goods.material}".encode()) % 5 == 0 or known in HELD_OUT


def make_goods(w: Wording, **fixed: str) -> Goods:
    """Random goods of the split: in the test split held-out combinations alone. `fixed` attributes are as given."""
    while True:
        category = w.one(list(CATEGORIES))
        goods = Goods(
            w.one(_FIRST) + w.one(_SECOND), category, w.one(list(COLOURS)) + "色", w.one(PATTERNS),
            w.one(CATEGORIES[category][1]), w.one(STYLES), w.one(SEASONS), w.number(3, 99) * 10 - w.one((0, 1)),
        )  # fmt: skip
        goods = replace(goods, **fixed)  # type: ignore[arg-type]
        if goods.material in CATEGORIES[goods.category][1] and is_held_out(goods) == (w.split == "test"):
            return goods

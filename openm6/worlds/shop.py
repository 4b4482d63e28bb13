"""A shop: goods with a look, purchases, and phrases that refer to one of eight goods.

    items        id, photo, title, attributes (a table), category, season, price, look
    pairs        two goods bought by one customer one after the other: photo, title, attributes, look of the first,
                 other_photo, other_title, other_attributes, other_id, other_look of the second
    visits       history (ids, the oldest first), season, festival, shown (ten ids), bought (one of them)
    references   phrase, photo (of the item meant) and negatives: the photos of seven others

A look is shared by goods that go together, and no column shows it completely: the warmth of the colour and the presence
of a pattern are in the picture alone, the style (简约, 复古, ...) is in the title or in the table. A customer likes two
looks, some categories and a price level, and buys goods that are popular, of the season, and, at a festival, more
expensive. Customers of the test split differ from those of training, who buy the same goods (`items/train`); the goods
of `pairs/test` and `references/test` are those of `items/test`, combinations that no training item shows."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from openm6.core.errors import UsageError, suggest
from openm6.data.store import ComputedRecords, Record, Records, StoredRecords, cached, check_split, shown, write_records
from openm6.worlds import draw
from openm6.worlds.draw import CATEGORIES, PATTERNS, STUDIO, VALUES, Placed
from openm6.worlds.market.goods import SEASONS, STYLES
from openm6.worlds.pictured import SPLITS, combinations, in_threads, with_pictures
from openm6.worlds.scenes import pointed

VERSION = 1  # of the records: see `pictured.drawn`

VIEWS = ("items", "pairs", "visits", "references")
ITEMS = {"train": 4_000, "validation": 500, "test": 1_000}
VISITS = {"train": 6_000, "validation": 1_000, "test": 1_000}
HISTORY, SHOWN, AMONG = 6, 10, 8

_WARM = ("红", "橙", "黄", "粉")
_MATERIALS = ("纯棉", "真丝", "帆布", "陶瓷", "羊毛", "尼龙")
_BRANDS = tuple(a + b for a in "云青星海松金" for b in "帆禾桥石")
_TITLES = ("{b}{f}{k}", "{b} {k} {f}款", "{f}{k} {b}出品", "新款{k}，{f}风", "{b}{k}")
_NAMELESS = len(_TITLES) - 1
"""The title without the style, which is in the table."""


class _Goods:
    """The items of a split, as records and as columns of numbers."""

    def __init__(self, split: str, seed: int, count: int):
        rng = np.random.default_rng([seed, SPLITS.index(split), 5])
        every = combinations(split)
        self.items = [every[i] for i in rng.integers(len(every), size=count)]
        self.style = rng.integers(len(STYLES), size=count)
        self.season = rng.integers(len(SEASONS), size=count)
        self.price = np.exp(rng.normal(4.6, 0.7, count)).round().clip(9, 2999)
        self.warm = np.array([item.colour in _WARM for item in self.items])
        self.bold = np.array([item.pattern != PATTERNS[0] for item in self.items])
        self.category = np.array([CATEGORIES.index(item.category) for item in self.items])
        self.look = (self.style * 2 + self.warm) * 2 + self.bold
        self.popular = rng.permutation(count) + 10.0  # a rank; purchases decrease with it
        self.rows = [self._row(split, number, rng) for number in range(count)]

    def _row(self, split: str, number: int, rng: np.random.Generator) -> Record:
        item, style = self.items[number], STYLES[self.style[number]]
        kind = int(rng.integers(len(_TITLES)))
        brand = _BRANDS[rng.integers(len(_BRANDS))]
        table = {"品牌": brand, "材质": _MATERIALS[rng.integers(len(_MATERIALS))]}
        if kind == _NAMELESS:
            table["风格"] = style
        season, price = SEASONS[self.season[number]], int(self.price[number])
        table |= {"季节": season, "价格": f"{price}元"}
        names = [list(table)[i] for i in rng.permutation(len(table))]
        return {
            "_where": f"shop:items/{split}#{number}", "id": f"{split[:2]}{number:05}", "photo_number": number,
            "title": _TITLES[kind].format(b=brand, f=style, k=item.category),
            "attributes": {name: table[name] for name in names}, "category": item.category, "season": season,
            "price": price,
            "look": f"{style} {'暖' if self.warm[number] else '冷'} {'花' if self.bold[number] else '素'}",
        }  # fmt: skip

    def photo(self, seed: int, split: str, number: int) -> Record:
        rng = np.random.default_rng([seed, SPLITS.index(split), number, 6])
        size = rng.uniform(0.6, 0.9)
        x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
        return {"photo": draw.draw_picture([Placed(self.items[number], x, y, size)], rng, STUDIO)}


class _Customer:
    """A customer: preference for each item, apart from season and occasion."""

    def __init__(self, goods: _Goods, rng: np.random.Generator):
        liked = rng.choice(goods.look, 2)
        categories = rng.permutation(len(CATEGORIES))[:3]
        height = rng.normal(4.6, 0.6)
        near = [(goods.look == look) * 1.6 + (goods.style == look // 4) * 1.0 for look in liked]
        sides = [(goods.warm == look // 2 % 2) * 0.6 + (goods.bold == look % 2) * 0.6 for look in liked]
        looks = np.maximum(near[0] + sides[0], near[1] + sides[1])
        self._base = 1.3 * looks + 0.8 * np.isin(goods.category, categories) - 0.8 * np.log(goods.popular)
        self._goods, self._height, self._rng = goods, height, rng
        self._bought: list[int] = []

    def buy(self, season: int, festival: bool) -> int:
        """One of the goods that was not bought before."""
        height = self._height + 0.5 * festival
        like = self._base + 1.2 * (self._goods.season == season) - 1.2 * np.abs(np.log(self._goods.price) - height)
        like[self._bought] = -np.inf
        # The largest of sums with Gumbel noise: a draw from the softmax.
        chosen = int(np.argmax(like + self._rng.gumbel(size=len(like))))
        self._bought.append(chosen)
        return chosen


def _visits(goods: _Goods, split: str, seed: int, count: int) -> Iterator[tuple[list[int], Record]]:
    """The purchases of each customer, the last on the visit of the record."""
    odds = goods.popular**-0.8
    odds /= odds.sum()
    for number in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), number, 7])
        customer = _Customer(goods, rng)
        occasions = [(int(rng.integers(len(SEASONS))), bool(rng.random() < 0.3)) for _ in range(HISTORY + 1)]
        bought = [customer.buy(*occasion) for occasion in occasions]
        others = [int(i) for i in rng.choice(len(odds), SHOWN + HISTORY + 1, replace=False, p=odds) if i not in bought]
        seen = [bought[-1], *others[: SHOWN - 1]]
        ids = [goods.rows[i]["id"] for i in bought]
        yield bought, {
            "_where": f"shop:visits/{split}#{number}", "history": ids[:-1], "season": SEASONS[occasions[-1][0]],
            "festival": occasions[-1][1], "shown": [goods.rows[seen[i]]["id"] for i in rng.permutation(SHOWN)],
            "bought": ids[-1],
        }  # fmt: skip


def _pairs(goods: _Goods, split: str, seed: int, count: int) -> Iterator[Record]:
    for number, (bought, _) in enumerate(_visits(goods, split, seed, count)):
        for place, (a, b) in enumerate(pairwise(bought[:-1])):  # the last one belongs to the visit
            first, second = goods.rows[a], goods.rows[b]
            yield {
                "_where": f"shop:pairs/{split}#{number}.{place}", "photo_number": a, "other_photo_number": b,
                **{name: first[name] for name in ("title", "attributes", "look")},
                **{f"other_{name}": second[name] for name in ("id", "title", "attributes", "look")},
            }  # fmt: skip


def _references(goods: _Goods, split: str, seed: int) -> Iterator[Record]:
    for number, item in enumerate(goods.items):
        rng = np.random.default_rng([seed, SPLITS.index(split), number, 8])
        others: list[int] = []
        seen = {item}
        for other in rng.permutation(len(goods.items)):
            # Half of them similar, so that the category alone does not identify the item.
            near = sum(getattr(goods.items[other], k) == getattr(item, k) for k in VALUES)
            if goods.items[other] not in seen and near >= (len(others) < AMONG // 2):
                others.append(int(other))
                seen.add(goods.items[other])
            if len(others) == AMONG - 1:
                break
        yield {
            "_where": f"shop:references/{split}#{number}", "photo_number": number,
            "phrase": pointed([item, *(goods.items[i] for i in others)], 0, rng),
            "others": others,
        }  # fmt: skip


def open_shop(view: str, split: str = "train", seed: int = 0, records: int | None = None) -> Records:
    """The records of a view; `records` of its visits. Raises UsageError for an unknown view or split."""
    if view not in VIEWS:
        raise UsageError(f"The shop has no part {view!r}.{suggest(view, list(VIEWS))} It has: {', '.join(VIEWS)}.")
    check_split("The shop has", split, SPLITS)
    count = VISITS[split] if records is None else records
    of = "train" if view == "visits" else split
    goods = partial(_Goods, of, seed, ITEMS[of])
    key = {"version": VERSION, "split": split, "seed": seed}
    if view == "visits":

        def visits() -> Iterable[Record]:
            rows = (record for _, record in _visits(goods(), split, seed, count))
            return shown(rows, count, f"customers of the shop ({split})")

        return _kept(view, {**key, "count": count}, visits)
    photos = _kept("photos", key, lambda: _photos(goods(), split, seed))
    if view == "items":
        kept = _kept(view, key, lambda: goods().rows)
    elif view == "pairs":
        kept = _kept(view, {**key, "count": count}, lambda: _pairs(goods(), split, seed, count))
    else:
        references = _kept(view, key, lambda: _references(goods(), split, seed))

        def reference(index: int) -> Record:
            row = references[index]
            photo, *others = (photos.blob(number) for number in (row.pop("photo_number"), *row.pop("others")))
            return {**row, "photo": photo, "negatives": [{"photo": other} for other in others]}

        return ComputedRecords(len(references), ("phrase", "photo", "negatives"), reference)
    return with_pictures(photos, kept, {"photo_number": "photo", "other_photo_number": "other_photo"})


def _photos(goods: _Goods, split: str, seed: int) -> Iterator[Record]:
    draw = partial(goods.photo, seed, split)
    return in_threads(draw, len(goods.items), f"photographing the shop's goods ({split})")


def _kept(view: str, key: dict[str, object], make: Callable[[], Iterable[Record]]) -> StoredRecords:
    return StoredRecords(cached(f"shop-{view}", key, lambda folder: write_records(folder, make())))

"""Pictures of two to four goods, with tasks about them: grounding, entailment, matching.

Records: image (JPEG, 64 x 64); phrase (refers to one of the goods alone) and its box (left, top, right, bottom, as
fractions of the picture); statement and relation (蕴含: the picture shows it, 矛盾: it shows otherwise, 无关: it cannot
tell); description (of all goods), caption (the same, in half of the records wrong in one attribute) and match (是 or
否). The goods are the catalogue's, with its splits and held-out combinations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations as choose

import numpy as np

from openm6.data.store import Record, Records, check_split, drawn
from openm6.worlds import draw
from openm6.worlds.draw import CATEGORIES, COLOURS, PATTERNS, Item, Placed
from openm6.worlds.phrases import MEASURES
from openm6.worlds.pictured import SPLITS, combinations

VERSION = 2
"""Version of the generated records; increase it when the same seed gives other records, so that old caches are not
used."""

PICTURES = {"train": 12_000, "validation": 500, "test": 500}

_KINDS = ("category", "colour", "pattern")
_CORNERS = {"左上": (0.26, 0.26), "右上": (0.74, 0.26), "左下": (0.26, 0.74), "右下": (0.74, 0.74)}
_TRUE = ("图中有一{m}{n}。", "可以看到{n}。", "画面里有{n}。", "照片里能找到一{m}{n}。", "{n}在图里。")
_UNSEEN = (
    "{k}是真丝做的。",
    "{k}卖九十九元。",
    "{k}是昨天买的。",
    "{k}的主人是小红。",
    "{k}适合冬天用。",
    "这{m}{k}正在打折。",
)
_POINTED = ("{n}", "那{m}{n}", "请找出{n}", "{n}在哪里？", "图中的{n}")


def picture(seed: int, split: str, index: int) -> Record:
    """The record of one picture, determined by its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 4])
    every = combinations(split)
    corners = [list(_CORNERS)[i] for i in rng.permutation(4)[: rng.integers(2, 5)]]
    items: list[Item] = []
    while len(items) < len(corners):  # all different, so that a phrase can refer to one of them
        item = every[rng.integers(len(every))]
        if item not in items:
            items.append(item)
    image, boxes = _drawn(items, corners, rng)
    number = int(rng.integers(len(items)))
    statement, relation = _statement(items, rng)
    caption, match = _caption(items, split, rng)
    return {
        "_where": f"scenes/{split}#{index}", "image": image, "phrase": _phrase(items, corners, number, rng),
        "box": boxes[number], "statement": statement, "relation": relation, "description": _told(items, rng),
        "caption": caption, "match": match, "objects": len(items),
    }  # fmt: skip


def _drawn(items: list[Item], corners: list[str], rng: np.random.Generator) -> tuple[bytes, list[list[float]]]:
    canvas = draw.ground([COLOURS[item.colour] for item in items], rng)
    boxes = []
    for item, corner in zip(items, corners, strict=True):
        x, y = (at + rng.uniform(-0.03, 0.03) for at in _CORNERS[corner])
        one = Placed(item, x, y, rng.uniform(0.36, 0.46))
        boxes.append([round(share, 3) for share in draw.add(canvas, one, draw.look_of(one, rng), rng)])
    return draw.photo(canvas, rng), boxes


def named(item: Item, kinds: tuple[str, ...]) -> str:
    """An item by some of its attributes: 红色的条纹连衣裙, 红色的商品, 条纹商品."""
    colour = item.colour + "色的" if "colour" in kinds else ""
    return colour + (item.pattern if "pattern" in kinds else "") + (item.category if "category" in kinds else "商品")


def _phrase(items: list[Item], corners: list[str], number: int, rng: np.random.Generator) -> str:
    """A phrase that refers to one item, by attributes or by its corner."""
    if rng.random() < 0.2:
        return _POINTED[rng.integers(len(_POINTED))].format(n=corners[number] + "的商品", m="件")
    return pointed(items, number, rng)


def pointed(items: list[Item], number: int, rng: np.random.Generator) -> str:
    """A phrase that refers to one of several different items, by attributes that no other one has together."""
    item = items[number]
    sets = [kinds for count in (1, 2, 3) for kinds in choose(_KINDS, count)]
    alone = [k for k in sets if sum(all(getattr(o, n) == getattr(item, n) for n in k) for o in items) == 1]
    name = named(item, alone[rng.integers(len(alone))])
    measure = MEASURES[item.category] if item.category in name else "件"
    return _POINTED[rng.integers(len(_POINTED))].format(n=name, m=measure)


def _statement(items: list[Item], rng: np.random.Generator) -> tuple[str, str]:
    item, relation = items[rng.integers(len(items))], ("蕴含", "矛盾", "无关")[rng.integers(3)]
    words = {"k": item.category, "m": MEASURES[item.category]}
    if relation == "无关":
        return _UNSEEN[rng.integers(len(_UNSEEN))].format(**words), relation
    said = item
    while relation == "矛盾" and any(
        (said.category, said.colour) == (o.category, o.colour) for o in items
    ):  # the same goods in an absent colour, or other goods in its colour
        said = _changed(item, ("colour", "category")[rng.integers(2)], rng)
    words |= {"n": named(said, ("category", "colour")), "m": MEASURES[said.category]}
    return _TRUE[rng.integers(len(_TRUE))].format(**words), relation


def _changed(item: Item, kind: str, rng: np.random.Generator) -> Item:
    values = {"category": CATEGORIES, "colour": tuple(COLOURS), "pattern": PATTERNS}[kind]
    others = [value for value in values if value != getattr(item, kind)]
    return replace(item, **{kind: others[rng.integers(len(others))]})


def _caption(items: list[Item], split: str, rng: np.random.Generator) -> tuple[str, str]:
    told = list(items)
    match = "是" if rng.random() < 0.5 else "否"
    if match == "否":
        number, every = int(rng.integers(len(told))), combinations(split)
        # Wrong in one attribute; if possible a combination of the split, so that wrong captions are not recognizable.
        near = [o for o in every if sum(getattr(o, k) != getattr(told[number], k) for k in _KINDS) == 1]
        near = [o for o in near if o not in items] or [o for o in every if o not in items]
        told[number] = near[rng.integers(len(near))]
    return _told(told, rng), match


def _told(items: list[Item], rng: np.random.Generator) -> str:
    names = [f"一{MEASURES[items[i].category]}{named(items[i], _KINDS)}" for i in rng.permutation(len(items))]
    return "图中有" + "、".join(names) + "。"


def open_scenes(split: str, seed: int = 0, pictures: int | None = None) -> Records:
    """The records of a split, generated at the first call, then from the cache."""
    check_split("The scenes have", split, SPLITS)
    count = PICTURES[split] if pictures is None else pictures
    key = {"version": VERSION, "split": split, "seed": seed, "pictures": count}
    return drawn("scenes", key, count, partial(picture, seed, split), f"drawing the {split} scenes")

"""Virtual try-on: drawn people, a garment of the catalogue's kinds, and the same people wearing it.

A record has the pictures `person`, `garment` and `result`, all 64 x 64. Person and result show the same figure in the
same pose, before the same background, in the same light; one garment differs: the result shows the one of `garment`,
with its cut, its tones and its pattern. All other clothes stay, except those that a dress replaces. People wear
garments of the catalogue, or plain underclothes in colours that it does not have.

The combinations held out are the catalogue's: no picture of train or validation shows one of them, every garment of
test, laid out or worn, is one of them. In the split `varied`, for additional training, garments have any colours but
those of the catalogue, and no names for them: patterns are then not learned together with a few colours. The same seed
gives the same bytes."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from openm6.data.store import Record, Records, check_split, drawn
from openm6.worlds import draw
from openm6.worlds.draw import COLOURS, RGB, Colour, Item, Look, Manner, Placed
from openm6.worlds.people import Figure, Point, paint
from openm6.worlds.phrases import MEASURES
from openm6.worlds.pictured import combinations

VERSION = 2
"""Version of the generated records; increase it when the same seed gives other records, so that old caches are not
used."""

PICTURES = {"train": 24_000, "validation": 400, "test": 400, "varied": 24_000}
SPLITS = tuple(PICTURES)
GARMENTS = ("T恤", "连衣裙", "裤子")

PLAIN = 0.4
"""Fraction of the people in underclothes, above and below the waist independently."""

MANNER = Manner(tilt=0.1, skew=0.1, period=(0.2, 0.25), least=(10.0, 10.0), noise=(2, 5))
"""The manner of a studio; marks of a garment laid out are at least 10 pixels, so that they are 8 on a person: a cell
of the demo's codec."""

_OTHER_DRESS = 0.4  # fraction of the people who wear a dress before they try one on

_SKINS: tuple[RGB, ...] = ((242, 198, 160), (226, 172, 128), (190, 132, 92), (134, 88, 62))
_HAIRS: tuple[RGB, ...] = ((36, 30, 30), (84, 52, 34), (134, 84, 44), (196, 150, 84), (150, 150, 154))
_UNDERCLOTHES: tuple[RGB, ...] = ((240, 238, 232), (168, 170, 174), (206, 188, 160), (112, 116, 122))
_SHOES: tuple[RGB, ...] = ((60, 52, 50), (238, 236, 232), (128, 98, 72))
_UNDER = {"T恤": "背心", "裤子": "短裤"}
_HAIRCUTS = ("short", "long", "bun")
_POSES = (0.5, 0.25, 0.25)  # fractions of hanging arms, raised ones, and those with the hand on the hip

_CAPTIONS = (
    "一个人穿着{c}{p}{k}。",
    "图中的人穿着一{m}{c}的{p}{k}。",
    "这个人身上穿的是一{m}{p}的{c}{k}。",
    "有人穿着一{m}{c}{p}{k}站在那里。",
)

# The person and the clothes.


def figure_of(tint: Colour, rng: np.random.Generator) -> Figure:
    """A random figure that contrasts with a background of this tint."""
    skin = draw.apart(_SKINS, [tint], rng)
    return Figure(
        x=0.5 + rng.uniform(-0.04, 0.04), size=rng.uniform(0.94, 1.0), build=rng.uniform(0.98, 1.12),
        lean=rng.uniform(-0.16, 0.16), stance=rng.uniform(-0.005, 0.045), arms=(_arm(rng), _arm(rng)),
        haircut=_HAIRCUTS[rng.integers(len(_HAIRCUTS))], hair=draw.apart(_HAIRS, [skin], rng), skin=skin,
        shoes=draw.apart(_SHOES, [tint], rng),
    )  # fmt: skip


def _arm(rng: np.random.Generator) -> Point:
    """Angles of a hanging arm, a raised one, or one with the hand on the hip."""
    low, high, fore_low, fore_high = ((6, 35, -6, 40), (35, 70, 140, 175), (38, 50, -50, -35))[rng.choice(3, p=_POSES)]
    return math.radians(rng.uniform(low, high)), math.radians(rng.uniform(fore_low, fore_high))


def _some(split: str, category: str, rng: np.random.Generator, but: Item | None = None) -> Item:
    pool = [item for item in combinations(split) if item.category == category and item != but]
    return pool[rng.integers(len(pool))]


def clothes_for(split: str, item: Item, rng: np.random.Generator) -> dict[str, Item | None]:
    """Clothes of a person who is to try on this item: a garment by its kind, None for underclothes."""
    if item.category == "连衣裙" and rng.uniform() < _OTHER_DRESS:
        return {item.category: _some(split, item.category, rng, item)}
    clothes: dict[str, Item | None] = {}
    for category, under in _UNDER.items():
        plain = rng.uniform() < PLAIN
        clothes[under if plain else category] = None if plain else _some(split, category, rng, item)
    return clothes


def _free_colour(rng: np.random.Generator) -> RGB:
    """A random colour outside the catalogue's."""
    while True:
        red, green, blue = (int(level) for level in rng.integers(16, 240, 3))
        if min(math.dist((red, green, blue), named) for named in COLOURS.values()) > 50:
            return red, green, blue


def _underclothes(colour: RGB) -> Look:
    base = np.array(colour, np.float32)
    return Look(0.0, 1, 1.0, 1.0, 0, lambda u, v: 0.0, base, base, base * 0.85)


def record(seed: int, split: str, index: int) -> Record:
    """One record, determined by its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    item = _some(split, GARMENTS[rng.integers(len(GARMENTS))], rng)
    laid = Placed(item, 0.5 + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.03, 0.03), rng.uniform(0.78, 0.9))
    varied = split == "varied"

    def colour_of(one: Item) -> RGB:
        return _free_colour(rng) if varied else COLOURS[one.colour]

    colour = colour_of(item)
    look = draw.look_of(laid, rng, MANNER, colour)
    clothes = clothes_for(split, item, rng)
    colours = {kind: colour_of(one) for kind, one in clothes.items() if one}
    room, table = draw.ground([colour, *colours.values()], rng), draw.ground([colour], rng)
    tint = tuple(room.mean((0, 1)).tolist())
    figure = figure_of(tint, rng)
    plain = _underclothes(draw.apart(_UNDERCLOTHES, [tint, figure.skin], rng))
    before = {
        kind: draw.look_of(Placed(one, 0.5, 0.5, 0.84), rng, MANNER, colours[kind]) if one else plain
        for kind, one in clothes.items()
    }
    gone = (item.category, _UNDER[item.category]) if item.category in _UNDER else tuple(before)
    after = {**{kind: one for kind, one in before.items() if kind not in gone}, item.category: look}
    light = (1 + rng.uniform(-0.2, 0.2) * draw.COLUMNS + rng.uniform(-0.15, 0.15) * draw.ROWS)[:, :, None]
    person, result = paint(room, figure, [before, after], light)
    draw.add(table, laid, look, rng)
    # All three have one camera and exposure, so that the garment has the same tones in the result.
    camera = int(rng.integers(2**32))
    pictures = {"person": person, "garment": table, "result": result}
    found = {
        "_where": f"tryon/{split}#{index}",
        **{name: draw.photo(picture, np.random.default_rng(camera), MANNER) for name, picture in pictures.items()},
        "category": item.category,
        "pattern": item.pattern,
    }
    if varied:
        return found
    words = {"c": item.colour + "色", "p": item.pattern, "k": item.category, "m": MEASURES[item.category]}
    caption = _CAPTIONS[rng.integers(len(_CAPTIONS))].format(**words)
    return {**found, "colour": item.colour + "色", "caption": caption}


def open_figures(split: str = "train", seed: int = 0, pictures: int | None = None) -> Records:
    """Records: person, garment, result (JPEG bytes, 64 x 64), category, pattern; all but `varied`: colour, caption.

    Generated at the first call (a few milliseconds a record), then from the cache. Raises UsageError for an unknown
    split."""
    check_split("The try-on data has", split, SPLITS)
    count = PICTURES[split] if pictures is None else pictures
    key = {"version": VERSION, "split": split, "seed": seed, "pictures": count}
    return drawn("tryon", key, count, partial(record, seed, split), f"drawing the {split} people")

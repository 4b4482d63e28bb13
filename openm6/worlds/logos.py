"""Logo families: a few pictures of one emblem, to adapt a model to a subject that it has never seen.

A family is determined by its seed: a name of two characters, an outer shape, an inner one, two colours. Its pictures
show it at different places and sizes, slightly turned, on different backgrounds, and sometimes with the colours
exchanged, as families of logos have a light and a dark one. They can be rendered in any size: a large one shows the
same, with sharper edges. Records: image (JPEG), caption (four), name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from openm6.core.errors import UsageError
from openm6.data.store import ListRecords, Record, Records, check_split
from openm6.worlds import draw
from openm6.worlds.draw import COLOURS, SIDE, STUDIO
from openm6.worlds.outlines import Pen

PICTURES = {"train": 20, "test": 100}
SPLITS = tuple(PICTURES)

EXCHANGED = 0.25
"""Fraction of the pictures with the two colours exchanged."""

_FIRST, _SECOND = "云青星海松金玉风明远", "帆禾桥石川叶舟塔湾岭"
_CAPTIONS = ("{n}的标志。", "图中是{n}的标志。", "一个{n}标志。", "这是{n}的商标。")

Point = tuple[float, float]


def _ring(count: int, radius: float, turn: float = 0.0, inner: float | None = None) -> list[Point]:
    """Corners of a polygon about the middle; with `inner`, of a star."""
    corners = count if inner is None else 2 * count
    radii = (radius, radius if inner is None else inner)
    angles = [math.tau * i / corners + turn - math.pi / 2 for i in range(corners)]
    return [(0.5 + radii[i % 2] * math.cos(a), 0.5 + radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


_OUTER: tuple[Callable[[Pen], None], ...] = (
    lambda pen: pen.ellipse(0.06, 0.06, 0.94, 0.94),
    lambda pen: pen.polygon((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)),
    lambda pen: pen.polygon(*_ring(6, 0.47)),
    lambda pen: pen.polygon(*_ring(4, 0.49)),
    lambda pen: pen.polygon((0.1, 0.08), (0.9, 0.08), (0.9, 0.52), (0.5, 0.95), (0.1, 0.52)),
)
_INNER: tuple[Callable[[Pen], None], ...] = (
    lambda pen: pen.polygon(*_ring(5, 0.3, inner=0.13)),
    lambda pen: pen.polygon(*_ring(3, 0.3)),
    lambda pen: pen.ellipse(0.27, 0.27, 0.73, 0.73),
    lambda pen: pen.polygon(
        (0.42, 0.22), (0.58, 0.22), (0.58, 0.42), (0.78, 0.42), (0.78, 0.58), (0.58, 0.58), (0.58, 0.78),
        (0.42, 0.78), (0.42, 0.58), (0.22, 0.58), (0.22, 0.42), (0.42, 0.42),
    ),
    lambda pen: pen.slice(0.22, 0.22, 0.78, 0.78, 40, 320),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    outer: int
    inner: int
    colours: tuple[str, str]


def family(seed: int) -> Family:
    rng = np.random.default_rng([seed, 7])
    first, second = rng.permutation(len(COLOURS))[:2]
    names = list(COLOURS)
    name = _FIRST[rng.integers(len(_FIRST))] + _SECOND[rng.integers(len(_SECOND))]
    outer, inner = (int(rng.integers(len(shapes))) for shapes in (_OUTER, _INNER))
    return Family(name, outer, inner, (names[first], names[second]))


def picture(seed: int, split: str, index: int, side: int = SIDE) -> Record:
    """One record, determined by its arguments."""
    one, rng = family(seed), np.random.default_rng([seed, SPLITS.index(split), index, 7])
    base, mark = (np.array(COLOURS[name], np.float32) for name in one.colours)
    if rng.random() < EXCHANGED:
        base, mark = mark, base
    size, turn = rng.uniform(0.5, 0.85), rng.uniform(-0.2, 0.2)
    x, y = 0.5 + rng.uniform(-0.5, 0.5, 2) * (1 - size)
    canvas = _enlarged(draw.ground([COLOURS[name] for name in one.colours], rng), side)
    for shape, colour in ((_OUTER[one.outer], base), (_INNER[one.inner], mark)):
        share = _laid(shape, x, y, size, turn, side)
        canvas = canvas * (1 - share) + share * colour
    told = [text.format(n=one.name) for text in _CAPTIONS]
    return {
        "_where": f"logos/{split}?seed={seed}#{index}", "image": draw.photo(canvas, rng, STUDIO), "caption": told,
        "name": one.name,
    }  # fmt: skip


def _enlarged(canvas: np.ndarray, side: int) -> np.ndarray:
    if side == len(canvas):
        return canvas
    parts = (Image.fromarray(canvas[:, :, i]).resize((side, side), Image.Resampling.BICUBIC) for i in range(3))
    return np.stack([np.asarray(part) for part in parts], 2)


def _laid(shape: Callable[[Pen], None], x: float, y: float, size: float, turn: float, side: int) -> np.ndarray:
    """Coverage of each pixel by a shape, float32 [side, side, 1], which fills a square of `size` about (x, y)."""
    finer = 4 if side <= 256 else 2
    pen, fine = Pen(2 * finer * side), finer * side
    shape(pen)
    c, s = math.cos(turn) / size, math.sin(turn) / size
    scale = pen.scale / fine
    a, b, d, e = c * scale, s * scale, -s * scale, c * scale
    u, v = pen.scale * (0.5 - c * x - s * y), pen.scale * (0.5 + s * x - c * y)
    large = pen.image.transform((fine, fine), Image.Transform.AFFINE, (a, b, u, d, e, v), Image.Resampling.BILINEAR)
    return np.asarray(large.reduce(finer), np.float32)[:, :, None] / 255


def open_logos(split: str = "train", seed: int = 0, pictures: int | None = None, side: int | None = None) -> Records:
    """The pictures of the family `seed`, of `side` pixels (64). Raises UsageError for an unknown split, or a side
    outside 16 to 2,048."""
    check_split("The logos have", split, SPLITS)
    side = SIDE if side is None else side
    if not 16 <= side <= 2048:
        raise UsageError(f"side is {side}; logos have 16 to 2,048 pixels.")
    count = PICTURES[split] if pictures is None else pictures
    return ListRecords([picture(seed, split, index, side) for index in range(count)])

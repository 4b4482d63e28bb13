"""Drawn people: a body in a pose, and the garments it wears."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from openm6.worlds import draw
from openm6.worlds.draw import RGB, SIDE, Look
from openm6.worlds.outlines import Pen

_UNIT = 0.7  # side of a worn garment's unit square over the picture's: marks are a fifth smaller than laid out
_EYES: RGB = (52, 32, 32)

Point = tuple[float, float]

# Heights of a standing figure in the unit square; x is counted from its middle.
_HEAD, _SHOULDER, _WAIST, _HIP, _FOOT, _GROUND = 0.145, 0.275, 0.44, 0.57, 0.945, 0.975


@dataclass(frozen=True, slots=True)
class Figure:
    """A person. `arms`, left and right, are the angles of upper arm and forearm: from straight down, outwards."""

    x: float
    size: float
    build: float
    lean: float
    stance: float
    arms: tuple[Point, Point]
    haircut: str
    hair: RGB
    skin: RGB
    shoes: RGB

    def bend(self, y: np.ndarray | float) -> np.ndarray | float:
        """Horizontal displacement at a height: the body leans from the hip."""
        return self.lean * np.maximum(0.0, _HIP - y)

    def at(self, point: Point) -> Point:
        """Position of a point of the figure in the picture."""
        x, y = point
        return self.x + self.size * (x * self.build + float(self.bend(y))), _GROUND - self.size * (_GROUND - y)

    def leg(self, side: int) -> tuple[Point, Point]:
        """Joint and ankle of a leg."""
        return (side * 0.085, _HIP), (side * (0.09 + self.stance), _FOOT - 0.02)

    def arm(self, side: int) -> tuple[Point, Point, Point]:
        """Shoulder, elbow and hand of an arm."""
        upper, fore = self.arms[(side + 1) // 2]
        shoulder = (side * 0.15, _SHOULDER + 0.03)
        elbow = (shoulder[0] + side * 0.165 * math.sin(upper), shoulder[1] + 0.165 * math.cos(upper))
        return shoulder, elbow, (elbow[0] + side * 0.15 * math.sin(fore), elbow[1] + 0.15 * math.cos(fore))


class _Brush:
    """A brush in a figure's coordinates."""

    def __init__(self, figure: Figure):
        self.figure, self.pen = figure, Pen(4 * SIDE)

    def polygon(self, *points: Point) -> None:
        self.pen.polygon(*map(self.figure.at, points))

    def halves(self, *points: Point) -> None:
        """A polygon by the points of its right half, and their mirror images."""
        self.polygon(*points, *((-x, y) for x, y in reversed(points)))

    def oval(self, centre: Point, rx: float, ry: float, fill: int = 255) -> None:
        (x, y), rx, ry = self.figure.at(centre), rx * self.figure.size, ry * self.figure.size
        self.pen.ellipse(x - rx, y - ry, x + rx, y + ry, fill)

    def limb(self, start: Point, end: Point, first: float, last: float) -> None:
        """Draw a limb from joint to joint, round at the start; `first` and `last` are its widths."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        nx, ny = -dy / math.hypot(dx, dy) / 2, dx / math.hypot(dx, dy) / 2
        sides = [(x + s * w * nx, y + s * w * ny) for (x, y), w, s in
                 ((start, first, 1), (end, last, 1), (end, last, -1), (start, first, -1))]  # fmt: skip
        self.polygon(*sides)
        self.oval(start, first / 2, first / 2)

    def share(self, points: int = 1) -> np.ndarray:
        """Coverage, 0 to 1: float32 [points SIDE, points SIDE]."""
        return np.asarray(self.pen.image.reduce(4 // points), np.float32) / 255


# Parts of a body.


def _back_hair(brush: _Brush) -> None:
    if brush.figure.haircut == "long":
        brush.oval((0, _HEAD), 0.098, 0.11)
        brush.halves((0.098, _HEAD), (0.115, _SHOULDER + 0.04))
    if brush.figure.haircut == "bun":
        brush.oval((0, _HEAD - 0.105), 0.045, 0.04)


def _limbs(brush: _Brush) -> None:
    brush.halves((0.14, _SHOULDER), (0.13, _WAIST), (0.15, _HIP))
    for side in (-1, 1):
        joint, ankle = brush.figure.leg(side)
        brush.limb(joint, ankle, 0.13, 0.075)
        shoulder, elbow, _ = brush.figure.arm(side)
        brush.limb(shoulder, elbow, 0.085, 0.07)


def _neck(brush: _Brush) -> None:
    brush.halves((0.038, _HEAD), (0.04, _SHOULDER - 0.03), (0.075, _SHOULDER - 0.01))


def _feet(brush: _Brush) -> None:
    for side in (-1, 1):
        x, y = brush.figure.leg(side)[1]
        brush.oval((x + side * 0.012, y + 0.018), 0.055, 0.03)


def _forearms(brush: _Brush) -> None:
    for side in (-1, 1):
        _, elbow, hand = brush.figure.arm(side)
        brush.limb(elbow, hand, 0.07, 0.055)
        brush.oval(hand, 0.036, 0.038)


def _front_hair(brush: _Brush) -> None:
    brush.oval((0, _HEAD - 0.008), 0.094, 0.108)
    brush.oval((0, _HEAD + 0.045), 0.074, 0.09, fill=0)
    if brush.figure.haircut != "long":
        brush.pen.draw.rectangle((0, brush.figure.at((0, _HEAD))[1] * brush.pen.scale, 9999, 9999), fill=0)


def _eyes(brush: _Brush) -> None:
    for side in (-1, 1):
        brush.oval((side * 0.034, _HEAD + 0.01), 0.012, 0.014)


# Garments: as in `draw`, a body with the pattern and a trim in a darker tone; t in [0, 1] is the cut.


def _shirt(body: _Brush, trim: _Brush, t: float) -> None:
    body.halves((0.075, 0.245), (0.165, _SHOULDER), (0.15, _WAIST), (0.162, 0.615))
    for side in (-1, 1):
        shoulder, elbow, _ = body.figure.arm(side)
        reach = 0.55 + 0.4 * t
        end = (shoulder[0] + reach * (elbow[0] - shoulder[0]), shoulder[1] + reach * (elbow[1] - shoulder[1]))
        body.limb(shoulder, end, 0.105, 0.125)
    trim.oval((0, 0.25), 0.078, 0.06)
    for brush in (body, trim):
        brush.oval((0, 0.235), 0.06, 0.05, fill=0)


def _vest(body: _Brush, trim: _Brush, t: float) -> None:
    body.halves(
        (0.065, 0.315), (0.075, 0.255), (0.115, 0.255), (0.12, 0.32), (0.145, 0.35), (0.135, _WAIST), (0.155, 0.59)
    )


def _dress(body: _Brush, trim: _Brush, t: float) -> None:
    waist, hem = _WAIST + 0.02 * t, 0.19 + 0.1 * t
    body.halves(
        (0.06, 0.325), (0.075, 0.25), (0.115, 0.25), (0.12, 0.32), (0.15, 0.355), (0.122, waist), (hem, 0.8 - 0.04 * t)
    )
    trim.halves((0.125, waist - 0.015), (0.125, waist + 0.02))


def _legs(body: _Brush, reach: float, hem: float) -> None:
    body.halves((0.15, _HIP - 0.05), (0.168, _HIP + 0.03), (0.06, _HIP + 0.085))
    for side in (-1, 1):
        (x, y), (ankle, foot) = body.figure.leg(side)
        # From below the joint, so that its roundness stays below the waist.
        body.limb((x, y + 0.04), (x + reach * (ankle - x), y + reach * (foot - y)), 0.165, hem)


def _waistband(trim: _Brush) -> None:
    trim.halves((0.152, _HIP - 0.05), (0.155, _HIP - 0.02))


def _trousers(body: _Brush, trim: _Brush, t: float) -> None:
    _legs(body, 0.96, 0.11 + 0.07 * t)
    _waistband(trim)


def _shorts(body: _Brush, trim: _Brush, t: float) -> None:
    _legs(body, 0.36, 0.155)
    _waistband(trim)


_CUTS: dict[str, Callable[[_Brush, _Brush, float], None]] = {
    "背心": _vest, "裤子": _trousers, "短裤": _shorts, "T恤": _shirt, "连衣裙": _dress,
}  # fmt: skip
"""Garments in the order in which they are drawn."""

Outfit = dict[str, Look]
Layer = list[tuple[np.ndarray, np.ndarray]]
"""Coverage of the pixels [SIDE, SIDE], and the colour [3] of each."""


def paint(canvas: np.ndarray, figure: Figure, outfits: list[Outfit], light: np.ndarray) -> list[np.ndarray]:
    """The canvas [SIDE, SIDE, 3] with the person on it, once in each outfit; `light` is [SIDE, SIDE, 1]."""

    def part(shape: Callable[[_Brush], None], colour: RGB, shade: float = 1.0) -> Layer:
        shape(brush := _Brush(figure))
        return [(brush.share(), np.array(colour, np.float32) * np.float32(shade))]

    under = [
        part(_back_hair, figure.hair, 0.8), part(_limbs, figure.skin), part(_neck, figure.skin, 0.85),
        part(_feet, figure.shoes),
    ]  # fmt: skip
    over = [
        part(_forearms, figure.skin), part(lambda brush: brush.oval((0, _HEAD), 0.085, 0.1), figure.skin),
        part(_front_hair, figure.hair), part(_eyes, _EYES),
        part(lambda brush: brush.oval((0, _HEAD + 0.056), 0.022, 0.008), figure.skin, 0.6),
    ]  # fmt: skip
    painted = []
    for outfit in outfits:
        now = canvas
        for layer in (*under, *(worn(figure, kind, outfit[kind]) for kind in _CUTS if kind in outfit), *over):
            now = now * (1 - np.sum([share for share, _ in layer], 0))[:, :, None]
            for share, colour in layer:
                now += share[:, :, None] * light * colour
        painted.append(now)
    return painted


def worn(figure: Figure, kind: str, look: Look) -> Layer:
    """The layers of a garment on a person: cloth, marks, trim."""
    body, trim = _Brush(figure), _Brush(figure)
    _CUTS[kind](body, trim, look.cut)
    edge = trim.share(2)
    cloth = body.share(2) * (1 - edge)
    marks = cloth * look.marks(*_cloth(body, look.mirror))
    return [(draw.half(cloth - marks), look.base), (draw.half(marks), look.tone), (draw.half(edge), look.edge)]


def _cloth(body: _Brush, mirror: int) -> tuple[np.ndarray, np.ndarray]:
    """The garment's own coordinates (u, v) at two points a pixel, relative to the middle of the leaning body."""
    figure, unit = body.figure, _UNIT * body.figure.size
    _, upper, _, lower = body.pen.image.getbbox() or (0, 0, 0, 0)
    y, x = (np.mgrid[0 : 2 * SIDE, 0 : 2 * SIDE].astype(np.float32) + 0.5) / (2 * SIDE)
    bend = figure.size * figure.bend(_GROUND - (_GROUND - y) / figure.size)
    return mirror * (x - figure.x - bend) / unit, (y - (upper + lower) / 2 / body.pen.scale) / unit

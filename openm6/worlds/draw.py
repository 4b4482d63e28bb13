"""Rendering of the demo catalogue: eight kinds of goods in eight colours and four patterns, from outlines.

The outlines are rendered once, large; a picture resamples them at its own place, size and angle, at twice its
resolution, adds a pattern, shading and noise. All randomness comes from the generator given.

`figures` shows the same goods on a person, from their `Look`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from openm6.worlds.outlines import GOODS, PETS, Pen

SIDE = 64
"""Width and height of a picture, in pixels."""

_SHAPE = 160  # pixels of an outline's mask
_MARGIN = 0.06  # free border of the mask, so that resampling does not cut the edge
_VARIANTS = 5  # outlines a category

RGB = tuple[int, int, int]
Colour = tuple[float, ...]
Marks = Callable[[np.ndarray, np.ndarray], np.ndarray | float]
"""Coverage by the marks' tone at the points (u, v) of an item, 0 to 1; the item fills the unit square about (0, 0)."""

COLOURS: dict[str, RGB] = {
    "红": (212, 36, 40),
    "橙": (240, 126, 24),
    "黄": (244, 210, 48),
    "绿": (44, 156, 70),
    "蓝": (36, 96, 212),
    "紫": (128, 56, 172),
    "粉": (246, 148, 188),
    "黑": (34, 34, 38),
}
PATTERNS = ("纯色", "条纹", "圆点", "格子")

FAR = 90.0
"""Minimum distance of a background tint from an item's colour, in RGB of 0 to 255."""


@dataclass(frozen=True, slots=True)
class Manner:
    """Ranges of the random properties of pictures.

    tilt      maximum tilt of an item, in radians; skew: of its pattern
    period    of a pattern, as a fraction of the item; at least `least` pixels
    noise     of the camera, in levels of 255
    """

    tilt: float
    skew: float
    period: tuple[float, float]
    least: tuple[float, float]
    noise: tuple[float, float]


SNAPSHOT = Manner(tilt=0.26, skew=0.3, period=(0.15, 0.22), least=(5.0, 6.0), noise=(4, 12))
STUDIO = Manner(tilt=0.1, skew=0.1, period=(0.19, 0.24), least=(8.0, 8.0), noise=(2, 5))

_GROUNDS: tuple[RGB, ...] = (
    (236, 232, 222), (214, 226, 236), (226, 236, 218), (238, 220, 222), (206, 206, 210), (232, 226, 240),
    (150, 158, 166), (168, 152, 134), (138, 154, 142), (176, 166, 182), (92, 98, 108), (104, 92, 84),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """An item: its names in `CATEGORIES`, `COLOURS` and `PATTERNS`."""

    category: str
    colour: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Placed:
    """An item in a picture: its centre and its larger extent as fractions of the picture's side."""

    item: Item
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Look:
    """Appearance of one item: all its random properties except place and light."""

    angle: float
    mirror: int
    wide: float
    high: float
    variant: int
    marks: Marks
    base: np.ndarray
    tone: np.ndarray
    edge: np.ndarray

    @property
    def cut(self) -> float:
        """The parameter t of the outline, 0 to 1."""
        return self.variant / (_VARIANTS - 1)


CATEGORIES = tuple(GOODS)
_OUTLINES = GOODS | PETS


@cache
def _masks(category: str, variant: int) -> tuple[Image.Image, Image.Image]:
    """(body, trim) of an outline, its larger extent scaled to the unit square inside the margin."""
    body, trim = Pen(4 * _SHAPE), Pen(4 * _SHAPE)
    _OUTLINES[category](body, trim, variant / (_VARIANTS - 1))
    both = Image.fromarray(np.maximum(np.asarray(body.image), np.asarray(trim.image)))
    left, upper, right, lower = both.getbbox() or (0, 0, 1, 1)
    reach = max(right - left, lower - upper) * (0.5 + _MARGIN)
    middle = ((left + right) / 2, (upper + lower) / 2)
    box = (middle[0] - reach, middle[1] - reach, middle[0] + reach, middle[1] + reach)
    ready = []
    for pen in (body, trim):
        square = pen.image.transform((2 * _SHAPE, 2 * _SHAPE), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        ready.append(square.reduce(2))
    return ready[0], ready[1]


def draw_picture(
    placed: tuple[Placed, ...] | list[Placed], rng: np.random.Generator, manner: Manner = SNAPSHOT
) -> bytes:
    """The picture as JPEG bytes, 64 x 64: the items at their places, everything else at random."""
    canvas = ground([COLOURS[p.item.colour] for p in placed], rng)
    for one in placed:
        add(canvas, one, look_of(one, rng, manner), rng)
    return photo(canvas, rng, manner)


def photo(canvas: np.ndarray, rng: np.random.Generator, manner: Manner = SNAPSHOT) -> bytes:
    """The canvas as JPEG bytes, with random exposure and camera noise."""
    canvas = canvas * np.float32(rng.uniform(0.82, 1.12))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(*manner.noise))
    buffer = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE - 0.5


def ground(colours: list[RGB], rng: np.random.Generator) -> np.ndarray:
    """A background, float32 [SIDE, SIDE, 3]: a gradient of two tints, neither close to an item's colour."""
    first = np.array(apart(_GROUNDS, colours, rng, FAR), np.float32) + rng.uniform(-10, 10, 3)
    second = first + rng.uniform(-26, 26) + rng.uniform(-12, 12, 3)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (COLUMNS * math.cos(angle) + ROWS * math.sin(angle) + 0.7) / 1.4
    return np.float32(first) + ramp[:, :, None] * np.float32(second - first)


def apart(choices: tuple[RGB, ...], colours: Sequence[Colour], rng: np.random.Generator, least: float = 60.0) -> RGB:
    """A colour that differs from these by more than `least`; the farthest one where none does."""
    far = {choice: min((math.dist(choice, colour) for colour in colours), default=math.inf) for choice in choices}
    good = [choice for choice in choices if far[choice] > least] or [max(choices, key=far.__getitem__)]
    return good[rng.integers(len(good))]


def look_of(one: Placed, rng: np.random.Generator, manner: Manner = SNAPSHOT, colour: RGB | None = None) -> Look:
    """A random look of an item of this size; of another `colour` than its own where one is given."""
    angle, mirror = rng.uniform(-manner.tilt, manner.tilt), 1 - 2 * int(rng.integers(2))
    wide, high = rng.uniform(0.86, 1.0), rng.uniform(0.86, 1.0)
    variant = int(rng.integers(_VARIANTS))
    return Look(
        angle, mirror, wide, high, variant, _marks(one, rng, manner), *_tones(colour or COLOURS[one.item.colour], rng)
    )


def add(canvas: np.ndarray, one: Placed, look: Look, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Add one item to the canvas. Returns its box: left, top, right, bottom as fractions of the side."""
    angle = look.angle
    # The part of the picture that the item can touch; beyond it nothing is computed.
    reach = one.size * 0.5 * (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.02
    x0, x1 = max(0, int((one.x - reach) * SIDE)), min(SIDE, math.ceil((one.x + reach) * SIDE))
    y0, y1 = max(0, int((one.y - reach) * SIDE)), min(SIDE, math.ceil((one.y + reach) * SIDE))
    # From fine pixels of this part (two a pixel) to the item's own coordinates, in which it fills a unit square.
    c, s, step = math.cos(angle) / one.size, math.sin(angle) / one.size, 0.5 / SIDE
    a, b = c * step / look.wide * look.mirror, s * step / look.wide * look.mirror
    d, e = -s * step / look.high, c * step / look.high
    dx, dy = x0 / SIDE - one.x, y0 / SIDE - one.y
    u0, v0 = (c * dx + s * dy) / look.wide * look.mirror, (-s * dx + c * dy) / look.high
    size = (2 * (x1 - x0), 2 * (y1 - y0))
    pixels = _SHAPE / (1 + 2 * _MARGIN)
    to_mask = (a * pixels, b * pixels, u0 * pixels + _SHAPE / 2, d * pixels, e * pixels, v0 * pixels + _SHAPE / 2)
    body, trim = (
        np.asarray(m.transform(size, Image.Transform.AFFINE, to_mask, Image.Resampling.BILINEAR), np.float32) / 255
        for m in _masks(one.item.category, look.variant)
    )
    rows, columns = np.arange(size[1], dtype=np.float32)[:, None], np.arange(size[0], dtype=np.float32)
    body = body * (1 - trim)
    marks = body * look.marks(a * columns + b * rows + u0, d * columns + e * rows + v0)
    body, marks, trim = half(body), half(marks), half(trim)
    light = (
        1
        + rng.uniform(-0.22, 0.22) * COLUMNS[y0:y1, x0:x1] / one.size
        + rng.uniform(-0.2, 0.2) * ROWS[y0:y1, x0:x1] / one.size
    )
    part = canvas[y0:y1, x0:x1]
    part *= (1 - body - trim)[:, :, None]
    for share, colour in ((body - marks, look.base), (marks, look.tone), (trim, look.edge)):
        part += (share * light)[:, :, None] * colour
    covered = body + trim > 0.5
    across, down = np.flatnonzero(covered.any(0)), np.flatnonzero(covered.any(1))
    return (
        float(x0 + across[0]) / SIDE, float(y0 + down[0]) / SIDE,
        float(x0 + across[-1] + 1) / SIDE, float(y0 + down[-1] + 1) / SIDE,
    )  # fmt: skip


def half(field: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels: [2H, 2W] to [H, W]."""
    return (field[::2, ::2] + field[1::2, ::2] + field[::2, 1::2] + field[1::2, 1::2]) * np.float32(0.25)


def _marks(one: Placed, rng: np.random.Generator, manner: Manner) -> Marks:
    """The marks of an item's pattern."""
    kind = one.item.pattern
    if kind == "纯色":
        return lambda u, v: 0.0
    # A mark has to stay wider than two pixels, also on a small item.
    period = max(one.size * rng.uniform(*manner.period), rng.uniform(*manner.least) / SIDE) / one.size
    angle = rng.uniform(-manner.skew, manner.skew) + (rng.integers(4) * math.pi / 4 if kind == "条纹" else 0.0)
    c, s, along = math.cos(angle), math.sin(angle), rng.uniform()
    across = 0.0 if kind == "条纹" else rng.uniform()
    width = rng.uniform(*{"条纹": (0.40, 0.52), "圆点": (0.30, 0.36), "格子": (0.34, 0.46)}[kind])

    def marks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        p = (u * c + v * s) / period + along
        if kind == "条纹":
            return (p % 1 < width).astype(np.float32)
        q = (v * c - u * s) / period + across
        if kind == "圆点":
            p = p + np.where(np.floor(q) % 2 == 0, 0.0, 0.5)  # every other row is shifted by half
            return ((p % 1 - 0.5) ** 2 + (q % 1 - 0.5) ** 2 < width**2).astype(np.float32)
        one_way, other_way = (p % 1 < width).astype(np.float32), (q % 1 < width).astype(np.float32)
        return np.float32(0.62) * (one_way + other_way) * (1 - np.float32(0.19) * one_way * other_way)

    return marks


def _tones(colour: RGB, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(base, marks, trim), float32 [3]: marks are white on dark colours and dark on light ones."""
    base = np.array(colour, np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    brightness = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    dark = brightness > 160 or (brightness > 135 and rng.uniform() < 0.5)
    tone = np.array((60, 50, 52) if dark else (245, 243, 238), np.float32) + rng.uniform(-10, 10, 3).astype(np.float32)
    edge = base * 0.58 if brightness > 60 else base + 60
    return base, tone, edge

"""Outlines of the objects in generated pictures: goods, and pets.

Unit square, y down; t in [0, 1] changes the cut. Each function draws a body (with the pattern) and a trim (straps,
soles, ears: a darker tone of the same colour)."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageDraw


class Pen:
    """Draws in unit coordinates into a mask of `scale` x `scale` pixels."""

    def __init__(self, scale: int) -> None:
        self.scale = scale
        self.image = Image.new("L", (self.scale, self.scale))
        self.draw = ImageDraw.Draw(self.image)

    def _at(self, points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def polygon(self, *points: tuple[float, float]) -> None:
        self.draw.polygon(self._at(points), fill=255)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        self.draw.ellipse(self._at(((x0, y0), (x1, y1))), fill=fill)

    def slice(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float) -> None:
        self.draw.pieslice(self._at(((x0, y0), (x1, y1))), start, end, fill=255)

    def arc(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, width: float) -> None:
        self.draw.arc(self._at(((x0, y0), (x1, y1))), start, end, fill=255, width=round(width * self.scale))

    def box(self, x0: float, y0: float, x1: float, y1: float, round_by: float = 0.0) -> None:
        self.draw.rounded_rectangle(self._at(((x0, y0), (x1, y1))), round_by * self.scale, fill=255)

    def line(self, width: float, *points: tuple[float, float]) -> None:
        self.draw.line(self._at(points), fill=255, width=round(width * self.scale), joint="curve")


def _dress(body: Pen, trim: Pen, t: float) -> None:
    waist, hem = 0.38 + 0.06 * t, 0.30 + 0.14 * t
    body.polygon(
        (0.36, 0.03), (0.42, 0.03), (0.45, 0.14), (0.55, 0.14), (0.58, 0.03), (0.64, 0.03), (0.66, 0.22),
        (0.60, waist), (0.5 + hem, 0.97), (0.5 - hem, 0.97), (0.40, waist), (0.34, 0.22),
    )  # fmt: skip
    trim.box(0.39, waist - 0.025, 0.61, waist + 0.035)


def _shirt(body: Pen, trim: Pen, t: float) -> None:
    reach = 0.40 + 0.22 * t
    body.polygon(
        (0.34, 0.08), (0.66, 0.08), (0.98, 0.24 + 0.2 * t), (0.84, reach + 0.06), (0.72, 0.36), (0.72, 0.95),
        (0.28, 0.95), (0.28, 0.36), (0.16, reach + 0.06), (0.02, 0.24 + 0.2 * t),
    )  # fmt: skip
    body.ellipse(0.40, 0.0, 0.60, 0.17, fill=0)
    trim.arc(0.375, -0.03, 0.625, 0.195, 20, 160, 0.03)


def _trousers(body: Pen, trim: Pen, t: float) -> None:
    outer, inner = 0.20 + 0.12 * t, 0.05 - 0.02 * t
    body.polygon(
        (0.30, 0.03), (0.70, 0.03), (0.74, 0.34), (0.5 + outer, 0.97), (0.5 + inner, 0.97), (0.50, 0.36),
        (0.5 - inner, 0.97), (0.5 - outer, 0.97), (0.26, 0.34),
    )  # fmt: skip
    trim.box(0.295, 0.03, 0.705, 0.09)


def _hat(body: Pen, trim: Pen, t: float) -> None:
    top = 0.30 - 0.14 * t
    body.box(0.27, top, 0.73, 0.75, 0.14)
    body.ellipse(0.02, 0.56, 0.98, 0.80)
    trim.polygon((0.27, 0.52), (0.73, 0.52), (0.73, 0.60), (0.27, 0.60))


def _shoe(body: Pen, trim: Pen, t: float) -> None:
    top = 0.32 - 0.16 * t
    body.polygon(
        (0.06, top), (0.34, top), (0.40, 0.42), (0.60, 0.53), (0.84, 0.56), (0.95, 0.64), (0.97, 0.78), (0.04, 0.78)
    )
    trim.box(0.03, 0.77, 0.98, 0.87, 0.03)
    for shift in (0.0, 0.09, 0.18):
        trim.line(0.025, (0.36 + shift, 0.52 + shift * 0.55), (0.45 + shift, 0.40 + shift * 0.6))


def _bag(body: Pen, trim: Pen, t: float) -> None:
    top = 0.36 + 0.12 * t
    body.polygon((0.14, top), (0.86, top), (0.96, 0.95), (0.04, 0.95))
    trim.arc(0.28, 0.05, 0.72, 2 * top - 0.02, 180, 360, 0.055)
    trim.box(0.44, top, 0.56, top + 0.14, 0.02)


def _cup(body: Pen, trim: Pen, t: float) -> None:
    foot = 0.04 + 0.08 * t
    body.polygon((0.08, 0.14), (0.68, 0.14), (0.68 - foot, 0.92), (0.08 + foot, 0.92))
    body.ellipse(0.08 + foot, 0.87, 0.68 - foot, 0.97)
    body.arc(0.48, 0.26, 0.96, 0.74, 270 - 30, 360 + 120, 0.085)
    trim.ellipse(0.08, 0.07, 0.68, 0.21)


def _umbrella(body: Pen, trim: Pen, t: float) -> None:
    top = 0.06 + 0.08 * t
    body.slice(0.02, top, 0.98, 1.02 - top, 180, 360)
    for left in (0.02, 0.26, 0.50, 0.74):
        body.ellipse(left, 0.48, left + 0.24, 0.62, fill=0)
    trim.line(0.035, (0.5, 0.50), (0.5, 0.88))
    trim.arc(0.355, 0.80, 0.518, 0.97, 0, 180, 0.035)
    trim.line(0.035, (0.5, top - 0.05), (0.5, top + 0.02))


Outline = Callable[[Pen, Pen, float], None]

GOODS: dict[str, Outline] = {
    "连衣裙": _dress, "T恤": _shirt, "裤子": _trousers, "帽子": _hat,
    "鞋": _shoe, "包": _bag, "杯子": _cup, "雨伞": _umbrella,
}  # fmt: skip


def _cat(body: Pen, trim: Pen, t: float) -> None:
    body.ellipse(0.18, 0.40, 0.74, 0.97)
    body.ellipse(0.24, 0.10, 0.68, 0.50)
    trim.polygon((0.26, 0.24), (0.27, 0.02), (0.42, 0.13))
    trim.polygon((0.66, 0.24), (0.65, 0.02), (0.50, 0.13))
    trim.arc(0.50, 0.38 + 0.1 * t, 0.96, 0.94, 290, 90 + 40, 0.07)


def _dog(body: Pen, trim: Pen, t: float) -> None:
    body.box(0.20, 0.40, 0.86, 0.68, 0.12)
    for left in (0.22, 0.36, 0.62, 0.76):
        body.box(left, 0.60, left + 0.10, 0.95, 0.03)
    body.ellipse(0.06, 0.14, 0.42, 0.52)
    body.box(0.0, 0.30, 0.22, 0.46, 0.06)
    trim.ellipse(0.28, 0.14, 0.44, 0.46)
    trim.line(0.07, (0.84, 0.46), (0.97, 0.30 - 0.16 * t))


def _rabbit(body: Pen, trim: Pen, t: float) -> None:
    body.ellipse(0.16, 0.52, 0.84, 0.98)
    body.ellipse(0.28, 0.30, 0.72, 0.66)
    spread = 0.06 * t
    trim.ellipse(0.32 - spread, 0.0, 0.45 - spread, 0.38)
    trim.ellipse(0.55 + spread, 0.0, 0.68 + spread, 0.38)
    trim.ellipse(0.80, 0.70, 0.96, 0.86)


def _fish(body: Pen, trim: Pen, t: float) -> None:
    high = 0.22 + 0.08 * t
    body.ellipse(0.02, 0.5 - high, 0.72, 0.5 + high)
    trim.polygon((0.66, 0.5), (0.98, 0.24), (0.90, 0.5), (0.98, 0.76))
    trim.polygon((0.26, 0.54 - high), (0.56, 0.54 - high), (0.52, 0.36 - high))


PETS: dict[str, Outline] = {"猫": _cat, "狗": _dog, "兔子": _rabbit, "鱼": _fish}

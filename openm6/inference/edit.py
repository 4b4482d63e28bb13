"""Pictures changed in part: redrawn inside a mask, varied, continued beyond an edge.

The model draws squares of its own size. For an edit it gets the square of the picture around the mask, scaled to that
size, and draws the blocks (a block is the area of one code) that the mask touches. The result is scaled back and pasted
into the picture at the picture's own size, inside the mask only: every pixel outside of it, and the transparency, are
bit-identical.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, UsageError
from openm6.core.extras import require
from openm6.core.files import dumps, loads
from openm6.core.images import ORIGIN, Source, open_image, read_square
from openm6.inference.draw import OPEN
from openm6.inference.rank import fresh_seed
from openm6.inference.session import Session
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.task import Task

_log = logging.getLogger(__name__)

SIDES = ("left", "right", "top", "bottom")
MARKED = 128
"""A mask with an alpha channel marks the pixels with an alpha below this value; a mask without one marks the pixels
with at least this grey value."""
MARGIN = 0.25
"""Width of the context on each side of the mask, as a fraction of the mask's longer side."""
COVERS_ALL = "The mask covers the whole picture: all of it is drawn again."


def edit(
    session: Session,
    task: str | Task,
    picture: Source,
    mask: Source | np.ndarray | None = None,
    *,
    candidates: int = 1,
    decoding: Mapping[str, Any] | None = None,
    **slots: Any,
) -> list[Candidate]:
    """Redraw the picture where the mask marks it, by the task's slots; the best candidate first.

    The `image` of a candidate has the picture's width, height and channels (L, LA, RGB or RGBA; palette colours
    become RGB, 16-bit values 8-bit). Its codes are those of the square around the mask. `mask`: see `marked_by`; None
    takes the picture's own transparency. A warning is logged for a mask that covers the whole picture.
    Raises UsageError for a mask of another size, or one that marks no visible pixel.
    """
    cut = cut_of(session.codec.size, session.codec.side, picture, mask)
    if cut.covers_all:
        _log.warning(COVERS_ALL)
    return _redraw(session, task, cut, candidates, decoding, slots)


@dataclass(frozen=True, slots=True)
class Cut:
    """The square of a picture that is redrawn, and how it is put back.

    picture      the whole picture, upright: L, LA, RGB or RGBA
    corner       left and upper pixel of the square, which may reach beyond the picture
    pixels       the square at the codec's size, uint8 [size, size, 3]
    open_blocks  its blocks that are redrawn, bool [side, side]
    weights      blending weight of the redrawn pixels, 0 to 255, as L of the square's own size
    is_filled    whether the redrawn pixels become opaque; otherwise they keep the picture's alpha
    covers_all   whether the mask marks every visible pixel
    """

    picture: Image.Image
    corner: tuple[int, int]
    pixels: np.ndarray
    open_blocks: np.ndarray
    weights: Image.Image
    is_filled: bool
    covers_all: bool

    def put_back(self, drawn: Image.Image) -> Image.Image:
        """The picture with the redrawn square, RGB [size, size], in its place."""
        pixels = blend(self.pixels, np.asarray(drawn), self.open_blocks)
        found, size = self.picture.copy(), self.weights.size
        patch = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(found.mode)
        if found.mode.endswith("A"):
            (left, top), (width, height) = self.corner, size
            given = found.getchannel("A").crop((left, top, left + width, top + height))
            patch.putalpha(255 if self.is_filled else given)
        found.paste(patch, self.corner, self.weights)
        if ORIGIN in drawn.info:  # only a part of this picture was drawn
            found.info[ORIGIN] = dumps({**loads(drawn.info[ORIGIN]), "edited": True})
        return found


def kept_codes_of(codec: PictureCodec, pixels: Source, open_blocks: np.ndarray) -> np.ndarray:
    """The codes of a square, OPEN where one is redrawn, int64 [side * side]."""
    return np.where(np.ravel(open_blocks), OPEN, codec.encode(pixels))


def marked_by(mask: Source | np.ndarray) -> np.ndarray:
    """The pixels that a mask marks for redrawing, bool [H, W].

    A mask with an alpha channel marks its transparent pixels (alpha below 128), as in OpenAI's images/edits; one
    without marks its white pixels (grey value 128 or above); a bool array marks its true ones.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        return mask
    image = open_image(mask, alpha=True)
    if image.mode.endswith("A"):
        return np.asarray(image.getchannel("A")) < MARKED
    return np.asarray(image.convert("L")) >= MARKED


def cut_of(size: int, side: int, picture: Source, mask: Source | np.ndarray | None = None) -> Cut:
    """The Cut that `edit` redraws with a codec of `size` pixels and `side` blocks a side. Raises as `edit` does."""
    whole, is_own = open_image(picture, alpha=True), mask is None
    has_alpha = whole.mode.endswith("A")
    if is_own and not has_alpha:
        raise UsageError("The picture is transparent nowhere: a mask has to say what is redrawn.", param="mask")
    marked = marked_by(whole if mask is None else mask)
    if marked.shape != (whole.height, whole.width):
        raise UsageError(
            f"The mask has {marked.shape[1]} x {marked.shape[0]} pixels and the picture {whole.width} x "
            f"{whole.height}: they have to be of one size.", param="mask",
        )  # fmt: skip
    if not marked.any():
        raise UsageError(
            "The mask marks nothing: with an alpha channel it marks what is transparent (alpha below 128), without one "
            "what is white (grey value 128 or above).", param="mask",
        )  # fmt: skip
    seen = np.asarray(whole.getchannel("A")) > 0 if has_alpha and not is_own else np.ones_like(marked)
    if not (marked & seen).any():
        raise UsageError(
            "The mask marks only what is transparent in the picture, where no change would be seen: leave it out, "
            "and what is transparent is filled in.", param="mask",
        )  # fmt: skip
    left, top, width = square_around(marked, size)
    marks = _view(marked, left - 1, top - 1, width + 2)  # one pixel more, to find edges at the border too
    inside = marks[1:-1, 1:-1]
    weights = 255 * inside
    if not (is_own or marks.all()):  # invisible colours of transparent pixels are not blended into others
        require("edit", "scipy")
        from scipy import ndimage

        depth = ndimage.distance_transform_edt(marks)[1:-1, 1:-1]
        weights = weights * (depth / max(1.0, min(width / side, depth.max()) / 2)).clip(0, 1)
    return Cut(
        picture=whole,
        corner=(left, top),
        pixels=read_square(_view(np.asarray(open_image(whole)), left, top, width), size),
        open_blocks=_blocks_of(inside, side),
        weights=Image.fromarray(weights.round().astype(np.uint8)),
        is_filled=is_own,
        covers_all=bool((marked | ~seen).all()),
    )


def square_around(marked: np.ndarray, least: int) -> tuple[int, int, int]:
    """Left and upper pixel and width of the square that holds all marked pixels with a margin: within the picture, or,
    where the marked pixels exceed its shorter side, equally far beyond it on both sides. `least` is the minimum width,
    so that small masks are not enlarged without need."""
    spans = [np.flatnonzero(marked.any(axis))[[0, -1]] + (0, 1) for axis in (0, 1)]  # of columns, of rows
    needed = max(int(last - first) for first, last in spans)
    width = max(needed, min(max(least, math.ceil(needed * (1 + 2 * MARGIN))), *marked.shape))

    def start(span: np.ndarray, extent: int) -> int:
        room = extent - width
        return room // 2 if room < 0 else int(np.clip((span.sum() - width) // 2, 0, room))

    return start(spans[0], marked.shape[1]), start(spans[1], marked.shape[0]), width


def _blocks_of(marks: np.ndarray, side: int) -> np.ndarray:
    """The blocks that the marked pixels of a square touch, bool [side, side]; a block edge can lie within a pixel."""
    width = len(marks)
    spans = [slice(number * width // side, -(-(number + 1) * width // side)) for number in range(side)]
    rows = np.stack([marks[span].any(0) for span in spans])
    return np.stack([rows[:, span].any(1) for span in spans], 1)


def _view(values: np.ndarray, left: int, top: int, width: int) -> np.ndarray:
    """A square of [H, W, ...]; beyond the border the edge values are repeated."""
    rows, columns = (
        np.arange(start, start + width).clip(0, extent - 1)
        for start, extent in zip((top, left), values.shape[:2], strict=True)
    )
    return values[rows][:, columns]


def vary(
    session: Session,
    task: str | Task,
    picture: Source,
    *,
    fraction: float = 0.6,
    candidates: int = 1,
    decoding: Mapping[str, Any] | None = None,
    **slots: Any,
) -> list[Candidate]:
    """Variations of the picture's middle square, of the codec's size: a fraction of its codes, at random places, is
    drawn again, by the seed of `decoding` or a fresh one. Raises UsageError for a fraction outside ]0, 1]."""
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction is {fraction}; it is above 0, and at most 1.")
    codes, options = session.codec.encode(picture), {"seed": fresh_seed(), **(decoding or {})}
    places = np.random.default_rng(int(options["seed"])).permutation(len(codes))
    kept = np.where(places < max(1, round(fraction * len(codes))), OPEN, codes)
    return session.draw(task, candidates=candidates, decoding=options, kept=kept, **slots)


def extend(
    session: Session,
    task: str | Task,
    picture: Source,
    side: str,
    pixels: int,
    *,
    decoding: Mapping[str, Any] | None = None,
    **slots: Any,
) -> Image.Image:
    """The picture, at its own size, continued beyond one side by `pixels`.

    It is drawn in strips of at most half the side's length, each next to the previous one and by the next seed. The
    given pixels do not change; the new ones are opaque. `seed_of_drawn` returns the seed of the first strip, which
    continues the picture in the same way again.
    """
    if side not in SIDES:
        raise UsageError(f"side is {side}; it can be {', '.join(SIDES)}.")
    if pixels < 1:
        raise UsageError(f"pixels is {pixels}; it has to be 1 or more.")
    codec, options = session.codec, {"seed": fresh_seed(), **(decoding or {})}
    found, left = open_image(picture, alpha=True), pixels
    seed = int(options["seed"])
    most = max(1, (found.height if side in ("left", "right") else found.width) // 2)
    while left:
        step = min(most, left)
        cut = cut_of(codec.size, codec.side, *_continued(found, side, step))
        found, left = _redraw(session, task, cut, 1, options, slots)[0].image, left - step
        options["seed"] = int(options["seed"]) + 1
    origin = loads(found.info[ORIGIN])
    found.info[ORIGIN] = dumps({**origin, "options": {**origin["options"], "seed": seed}})
    return found


def _continued(picture: Image.Image, side: str, pixels: int) -> tuple[Image.Image, np.ndarray]:
    """A picture whose border is repeated beyond a side, and a mask of the new pixels."""
    before, after = (pixels, 0) if side in ("left", "top") else (0, pixels)
    widths = [(0, 0), (before, after)] if side in ("left", "right") else [(before, after), (0, 0)]
    new = np.pad(np.zeros((picture.height, picture.width), bool), widths, constant_values=True)
    values = np.asarray(picture)
    longer = np.pad(values, widths + [(0, 0)] * (values.ndim - 2), mode="edge")
    if picture.mode.endswith("A"):  # new pixels continue the visible colours: transparent ones lie on white
        seen = np.asarray(open_image(picture).convert(picture.mode[:-1])).reshape(*values.shape[:2], -1)
        longer[new, :-1] = np.pad(seen, [*widths, (0, 0)], mode="edge")[new]
        longer[new, -1] = 255
    canvas = Image.fromarray(longer)
    canvas.info.update(picture.info)
    return canvas, new


def _redraw(
    session: Session,
    task: str | Task,
    cut: Cut,
    candidates: int,
    decoding: Mapping[str, Any] | None,
    slots: Mapping[str, Any],
) -> list[Candidate]:
    kept = kept_codes_of(session.codec, cut.pixels, cut.open_blocks)
    drawn = session.draw(task, candidates=candidates, decoding=decoding, kept=kept, **slots)
    return [replace(candidate, image=cut.put_back(candidate.image)) for candidate in drawn]


def blend(given: np.ndarray, drawn: np.ndarray, open_blocks: np.ndarray) -> np.ndarray:
    """`given` uint8 [H, W, 3] with its open blocks [h, w] from `drawn`. The difference between the two at the seam is
    added to the open blocks, fading over half a block."""
    if given.shape != drawn.shape:
        raise DataError(f"pictures of {given.shape[:2]} and {drawn.shape[:2]} pixels cannot be blended.")
    stride = given.shape[0] // open_blocks.shape[0]
    inside = open_blocks.repeat(stride, 0).repeat(stride, 1)
    if inside.all():
        return drawn.copy()
    require("edit", "scipy")
    from scipy import ndimage

    distance, nearest = ndimage.distance_transform_edt(inside, return_indices=True)
    reach = max(1.0, stride / 2)
    # The differences along the seam, smoothed, so that the noise of one pixel does not draw a line.
    weight = ndimage.gaussian_filter((~inside).astype(np.float32), 1.0)
    off = (given.astype(np.float32) - drawn) * ~inside[..., None]
    smooth = ndimage.gaussian_filter(off, (1.0, 1.0, 0)) / np.maximum(weight, 1e-3)[..., None]
    carried = smooth[nearest[0], nearest[1]] * np.clip(1 - distance / reach, 0, 1)[..., None]
    found = given.copy()
    found[inside] = (drawn + carried).round().clip(0, 255).astype(np.uint8)[inside]
    return found

"""Pictures changed in part: redrawn inside a mask, varied, continued beyond an edge.

What a mask leaves is not touched: outside of the redrawn blocks (a block is what one code stands for) the pixels that
come back are the given ones, bit by bit. Inside, the drawn picture is brought to the given one's tone at the seam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from openm6.bundle import Bundle, Painting
from openm6.decode.draw import OPEN
from openm6.errors import DataError, UsageError
from openm6.images import Source, open_image, read_square
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.task import Task

SIDES = ("left", "right", "top", "bottom")


def edit(
    bundle: Bundle,
    task: str | Task,
    picture: Source,
    mask: Source | np.ndarray,
    *,
    candidates: int = 1,
    decoding: Mapping[str, Any] | None = None,
    **slots: Any,
) -> list[Painting]:
    """The picture redrawn where `mask` is not black, by the task's slots, the best of the candidates first.

    A mask has the picture's width and height. Both are brought to the codec's square; a block is redrawn when the mask
    touches it. Raises UsageError for a mask of another size, or one that redraws nothing.
    """
    return _redraw(bundle, task, cut_of(bundle.codec, picture, mask), candidates, decoding, slots)


@dataclass(frozen=True, slots=True)
class Cut:
    """A picture, uint8 [size, size, 3], and its blocks that are to be redrawn, bool [side, side]."""

    pixels: np.ndarray
    open_blocks: np.ndarray

    def kept(self, codec: PictureCodec) -> np.ndarray:
        """The codes that stay, OPEN elsewhere, int64 [side * side]."""
        return np.where(self.open_blocks.ravel(), OPEN, codec.encode(self.pixels))

    def filled(self, drawn: list[Painting]) -> list[Painting]:
        """What was drawn, with the picture's own pixels where it stays."""
        blended = (blend(self.pixels, np.asarray(p.image), self.open_blocks) for p in drawn)
        return [replace(p, image=Image.fromarray(pixels)) for p, pixels in zip(drawn, blended, strict=True)]


def cut_of(codec: PictureCodec, picture: Source, mask: Source | np.ndarray) -> Cut:
    """See `edit`."""
    given, size = open_image(picture), codec.size
    if isinstance(mask, np.ndarray):
        mask = Image.fromarray((mask > 0).astype(np.uint8) * 255)
    shape = open_image(mask)
    if shape.size != given.size:
        raise UsageError(
            f"The mask has {shape.width} x {shape.height} pixels and the picture {given.width} x {given.height}: "
            "they have to be of one size."
        )
    wanted = read_square(shape, size).max(2) > 127
    open_blocks = codec.blocks_of(wanted)
    if not open_blocks.any():
        raise UsageError("The mask is black everywhere: nothing would be redrawn.")
    return Cut(read_square(given, size), open_blocks)


def vary(
    bundle: Bundle,
    task: str | Task,
    picture: Source,
    *,
    share: float = 0.6,
    candidates: int = 1,
    decoding: Mapping[str, Any] | None = None,
    seed: int = 0,
    **slots: Any,
) -> list[Painting]:
    """Pictures like this one: `share` of its codes, at random places, are drawn again."""
    if not 0 < share <= 1:
        raise UsageError(f"share is {share}; it is above 0, and at most 1.")
    codec = bundle.codec
    codes = codec.encode(picture)
    chosen = np.random.default_rng(seed).permutation(len(codes)) < max(1, round(share * len(codes)))
    return bundle.draw(task, candidates=candidates, decoding=decoding, kept=np.where(chosen, OPEN, codes), **slots)


def extend(
    bundle: Bundle,
    task: str | Task,
    picture: Source,
    side: str,
    pixels: int,
    *,
    decoding: Mapping[str, Any] | None = None,
    **slots: Any,
) -> Image.Image:
    """The picture, a square of the codec's size, continued beyond one side by `pixels`.

    It is drawn a half square at a time, each after what stands before it. The given part stays as it is.
    """
    if side not in SIDES:
        raise UsageError(f"side is {side}; it can be {', '.join(SIDES)}.")
    if pixels < 1:
        raise UsageError(f"pixels is {pixels}; it has to be 1 or more.")
    codec = bundle.codec
    stride, size = codec.stride, codec.size
    turns = {"right": 0, "bottom": 1, "left": 2, "top": 3}[side]  # so that it always grows to the right
    canvas = np.rot90(read_square(picture, size), turns)
    options = dict(decoding or {})
    while canvas.shape[1] < size + pixels:
        step = min(size // 2, -(-(size + pixels - canvas.shape[1]) // stride) * stride)
        window = np.concatenate((canvas[:, step - size :], np.repeat(canvas[:, -1:], step, 1)), 1)
        new = np.zeros((codec.side, codec.side), bool)
        new[:, codec.side - step // stride :] = True
        upright, blocks = (np.ascontiguousarray(np.rot90(a, -turns)) for a in (window, new))
        best = _redraw(bundle, task, Cut(upright, blocks), 1, options, slots)[0]
        canvas = np.concatenate((canvas, np.rot90(np.asarray(best.image), turns)[:, -step:]), 1)
        options["seed"] = int(options.get("seed", 0)) + 1
    return Image.fromarray(np.ascontiguousarray(np.rot90(canvas[:, : size + pixels], -turns)))


def _redraw(
    bundle: Bundle,
    task: str | Task,
    cut: Cut,
    candidates: int,
    decoding: Mapping[str, Any] | None,
    slots: Mapping[str, Any],
) -> list[Painting]:
    kept = cut.kept(bundle.codec)
    return cut.filled(bundle.draw(task, candidates=candidates, decoding=decoding, kept=kept, **slots))


def pixels_of(blocks: np.ndarray, stride: int) -> np.ndarray:
    """[h, w] blocks as [h stride, w stride] pixels."""
    return blocks.repeat(stride, 0).repeat(stride, 1)


def blend(given: np.ndarray, drawn: np.ndarray, open_blocks: np.ndarray) -> np.ndarray:
    """`given` uint8 [H, W, 3] with the open blocks [h, w] from `drawn`, whose difference from `given` at the seam is
    carried into them and fades over half a block."""
    if given.shape != drawn.shape:
        raise DataError(f"pictures of {given.shape[:2]} and {drawn.shape[:2]} pixels cannot be blended.")
    stride = given.shape[0] // open_blocks.shape[0]
    inside = pixels_of(open_blocks, stride)
    if inside.all():
        return drawn.copy()
    distance, nearest = ndimage.distance_transform_edt(inside, return_indices=True)
    reach = max(1.0, stride / 2)
    # The differences along the seam, smoothed, so that one pixel's noise draws no line.
    weight = ndimage.gaussian_filter((~inside).astype(np.float32), 1.0)
    off = (given.astype(np.float32) - drawn) * ~inside[..., None]
    smooth = ndimage.gaussian_filter(off, (1.0, 1.0, 0)) / np.maximum(weight, 1e-3)[..., None]
    carried = smooth[nearest[0], nearest[1]] * np.clip(1 - distance / reach, 0, 1)[..., None]
    found = given.copy()
    found[inside] = (drawn + carried).round().clip(0, 255).astype(np.uint8)[inside]
    return found

"""Pictures from the outside world: opened with limits, brought to the size that the model reads.

A picture is refused by its header, before its pixels are decoded, when it is larger than the limits below
(a 50,000 x 50,000 PNG of a few kilobytes would otherwise fill the memory).
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError

from openm6.errors import DataError

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000

Source = str | Path | bytes | np.ndarray | Image.Image
"""What may stand for a picture: a path, the bytes of a file, an array [H, W, 3] or [H, W], a PIL image."""


def open_image(source: Source, draft: tuple[int, int] | None = None, alpha: bool = False) -> Image.Image:
    """Open and decode a picture as RGB, turned upright by its EXIF orientation.

    `draft` lets the JPEG decoder stop at the nearest size not below (width, height): six times faster. With `alpha` a
    file that is transparent in places comes as RGBA.
    Raises DataError, in one sentence, for a missing, truncated, unknown or too large picture.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3):
            raise DataError(f"A picture array has to be uint8 [H, W] or [H, W, 3], not {source.dtype} {source.shape}.")
        return Image.fromarray(source).convert("RGB")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    name = "The picture" if isinstance(source, bytes) else f"The picture {str(source)[:200]}"
    size = len(source) if isinstance(source, bytes) else _size(Path(source), name)
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size / 2**20:.0f} MiB; at most {MAX_BYTES / 2**20:.0f} MiB are read.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{name} is {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are read: "
                    "shrink it first."
                )
            if draft:
                image.draft("RGB", draft)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGBA") if alpha and upright.has_transparency_data else _flatten(upright)
    except UnidentifiedImageError:
        raise DataError(f"{name} is in no picture format that is known here (JPEG, PNG, WebP, BMP, GIF).") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels: shrink it first.") from None
    except (OSError, SyntaxError, ValueError):
        # Pillow's own text can hold addresses and paths: it is not passed on.
        raise DataError(f"{name} is truncated or damaged.") from None


def sketch(source: Source, size: int) -> Image.Image:
    """The middle square of a picture as lines, black on white: where its colours change most."""
    smooth = Image.fromarray(read_square(source, size)).filter(ImageFilter.GaussianBlur(size / 50))
    red, green, blue = smooth.filter(ImageFilter.FIND_EDGES).split()
    edges = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    edges.paste(0, (0, 0, size, 1))  # the filter leaves the picture's border as it was
    edges.paste(0, (0, size - 1, size, size))
    edges.paste(0, (0, 0, 1, size))
    edges.paste(0, (size - 1, 0, size, size))
    return edges.point([255 if value < 32 else 0 for value in range(256)])


def _size(path: Path, name: str) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise DataError(f"{name} does not exist or cannot be read.") from None


def _flatten(image: Image.Image) -> Image.Image:
    """RGB, with transparency laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """How a picture becomes patches: `stride` pixels a patch side, at most `max_patches` patches.

    Every picture, small or large, is scaled to fill the budget, with the sides (multiples of `stride`)
    that come closest to its aspect ratio.
    """

    stride: int
    max_patches: int

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches for a picture of this size."""
        scale = math.sqrt(self.max_patches * self.stride**2 / (width * height))
        rows = max(1, min(self.max_patches, round(height * scale / self.stride)))
        columns = max(1, min(self.max_patches, round(width * scale / self.stride)))
        while rows * columns > self.max_patches:  # rounding went up on both sides
            if rows / height > columns / width:
                rows -= 1
            else:
                columns -= 1
        return rows, columns

    def read(self, source: Source) -> np.ndarray:
        """The picture as uint8 [rows * stride, columns * stride, 3]."""
        side = self.stride * math.isqrt(self.max_patches)
        image = open_image(source, draft=(side, side))
        rows, columns = self.fit(*image.size)
        size = (columns * self.stride, rows * self.stride)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return np.asarray(image)


def read_square(source: Source, size: int) -> np.ndarray:
    """The middle of a picture, as large as it goes, scaled to uint8 [size, size, 3]."""
    image = open_image(source, draft=(size, size))
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def check_features(pixels: np.ndarray, width: int) -> None:
    """Raises DataError where features stand in the place of pixels, of another width than the model's."""
    if pixels.dtype == np.float32 and pixels.shape[2] != width:
        raise DataError(f"Features of a picture have {pixels.shape[2]} numbers a patch, not {width}.")


def as_file(picture: Source) -> bytes:
    """The bytes of a picture's file; of what is none a PNG. Raises DataError for a path where nothing can be read."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, (str, Path)):
        try:
            return Path(picture).read_bytes()
        except OSError:
            raise DataError(f"The picture {str(picture)[:200]} does not exist or cannot be read.") from None
    return png(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))


_DATA_URL = re.compile(r"data:(?:image/[\w.+-]+)?;base64,", re.I)


def from_base64(text: str) -> bytes:
    """The bytes of a picture's file out of base64, or a data URL. Raises DataError for what is neither."""
    if len(text) > MAX_BYTES * 4 // 3 + 100:
        raise DataError(f"A picture has more than {MAX_BYTES / 2**20:.0f} MiB.")
    try:
        head = _DATA_URL.match(text)
        return base64.b64decode(text[head.end() :] if head else text, validate=True)
    except ValueError:
        raise DataError("A picture is given as base64, or as a data URL: this is neither.") from None


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Features:
    """What a model sees of a picture, in the place of the picture: features of its patches, row by row, fp16.

    `eyes` says by which weights they were made (model/files.py): only a model with the same ones can read them.
    """

    data: bytes
    rows: int
    columns: int
    eyes: str

    @classmethod
    def of(cls, value: Any) -> Features | None:
        """Out of a mapping, as requests and records have them, `features` as bytes or base64; None: it is none.

        Raises DataError for one that does not fit.
        """
        if isinstance(value, Features) or not isinstance(value, Mapping) or "features" not in value:
            return value if isinstance(value, Features) else None
        data, rows, columns = value["features"], value.get("rows"), value.get("columns")
        try:
            data = base64.b64decode(data, validate=True) if isinstance(data, str) else data
        except ValueError:
            data = None
        if not isinstance(data, bytes):
            raise DataError("has features that are no base64.")
        if not (isinstance(rows, int) and isinstance(columns, int) and 0 < rows < 2**12 and 0 < columns < 2**12):
            raise DataError("has features without their rows and columns, whole numbers.")
        if not data or len(data) % (2 * rows * columns):
            raise DataError("has features that do not fit their rows and columns: fp16, patch by patch.")
        found = cls(data, rows, columns, str(value.get("eyes", "")))
        if not np.isfinite(found.array()).all():
            raise DataError("has features that are no numbers.")
        return found

    def mapping(self) -> dict[str, Any]:
        return {"features": self.data, "rows": self.rows, "columns": self.columns, "eyes": self.eyes}

    def array(self) -> np.ndarray:
        """fp32 [rows, columns, D]."""
        return np.frombuffer(self.data, np.float16).reshape(self.rows, self.columns, -1).astype(np.float32)

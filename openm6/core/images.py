"""Pictures from outside: opened with limits, scaled to the size that the model reads.

A picture larger than the limits below is refused by its header, before its pixels are decoded (a 50,000 x 50,000 PNG of
a few kilobytes would otherwise fill the memory)."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from openm6.core.errors import DataError
from openm6.core.files import loads

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000

Source = str | Path | bytes | np.ndarray | Image.Image
"""A picture: a path, the bytes of a file, an array [H, W, 3] or [H, W], or a PIL image."""

PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".tga", ".icb", ".vda",
    ".vst", ".ico", ".cur", ".icns", ".pcx", ".dds", ".psd", ".qoi", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".xbm",
    ".xpm",
)  # fmt: skip
"""File name suffixes of pictures, in lower case."""

_FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "DIB", "TGA", "ICO", "CUR", "ICNS", "PCX",
    "DDS", "PSD", "QOI", "SGI", "SUN", "XBM", "XPM",
)  # fmt: skip
"""Pillow's picture formats. EPS is left out: Pillow runs Ghostscript, and so the file's own program, for it."""


def open_image(source: Source, draft: tuple[int, int] | None = None, alpha: bool = False) -> Image.Image:
    """Open and decode a picture as RGB, turned upright by its EXIF orientation.

    Transparent pixels are laid on white; with `alpha` they stay transparent, and greys stay greys: the mode is L, LA,
    RGB or RGBA. Grey values of 16 bits are scaled by their full range (65535 is white). Values of 32 bits have no
    agreed white: integers from 0 to 255 and fractions from 0 to 1 are taken as such, all others are scaled from the
    picture's smallest value (black) to its largest (white). `draft` lets the JPEG decoder stop at the nearest size not
    below (width, height): six times faster. Raises DataError for a missing, damaged, unknown or too large picture."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3):
            raise DataError(f"A picture array has to be uint8 [H, W] or [H, W, 3], not {source.dtype} {source.shape}.")
        if not alpha:
            return Image.fromarray(source).convert("RGB")
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _decode(source, "The picture", draft, alpha)
    if not isinstance(source, (str, Path, bytes)):
        raise DataError(f"A picture has to be a path or the bytes of a file, not {type(source).__name__}.")
    name = "The picture" if isinstance(source, bytes) else f"The picture {str(source)[:200]}"
    try:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    except OSError:
        raise DataError(f"{name} does not exist or cannot be read.") from None
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size / 2**20:.0f} MiB; at most {MAX_BYTES / 2**20:.0f} MiB are read.")
    Image.preinit()  # the usual formats; others are imported when needed
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    except UnidentifiedImageError:
        raise DataError(f"{name} is in no picture format that is known here (JPEG, PNG, WebP, TIFF ...).") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {MAX_PIXELS / 1e6:.0f} million pixels: shrink it first.") from None
    except Exception:
        raise DataError(f"{name} is truncated or damaged.") from None
    with image:
        return _decode(image, name, draft, alpha)


def _decode(image: Image.Image, name: str, draft: tuple[int, int] | None, alpha: bool) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name} is {width} x {height} pixels; at most {MAX_PIXELS / 1e6:.0f} million are read: shrink it first."
        )
    try:
        if draft:
            image.draft("RGB", draft)
        image.load()
        upright = _eight_bits(ImageOps.exif_transpose(image), image.format)
        upright.info.pop(ORIGIN, None)  # pictures derived from it are others
        is_clear = upright.has_transparency_data
        if alpha:
            found = upright.convert(("L" if upright.mode in ("1", "L", "LA", "La") else "RGB") + "A" * is_clear)
            if upright.mode == "CMYK":
                found.info.pop("icc_profile", None)  # the profile is for CMYK
            return found
        if is_clear:
            clear = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
        return upright.convert("RGB")
    except Exception:
        # Decoders raise any exception at damaged files (struct.error, IndexError ...); messages can hold addresses
        # and paths and are not shown.
        raise DataError(f"{name} is truncated or damaged.") from None


def _eight_bits(image: Image.Image, format: str | None) -> Image.Image:
    """The picture in a mode that Pillow converts to RGB without clipping its values."""
    if image.mode == "LAB":
        from PIL import ImageCms

        spaces = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *spaces, outputMode="RGB") or image
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    values[~np.isfinite(values)] = np.min(values, where=np.isfinite(values), initial=0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or format == "PPM":  # Pillow brings a PGM of more than 8 bits to 16
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= (1 if image.mode == "F" else 255):
        low, high = 0.0, 1.0 if image.mode == "F" else 255.0
    grey = Image.fromarray(((values - low) * 255 / (high - low or 1)).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the one transparent value, in the file's own range
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def sketch(source: Source, size: int) -> Image.Image:
    """An edge drawing of the middle square of a picture, black on white."""
    smooth = Image.fromarray(read_square(source, size)).filter(ImageFilter.GaussianBlur(size / 50))
    red, green, blue = smooth.filter(ImageFilter.FIND_EDGES).split()
    edges = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    edges = ImageOps.expand(ImageOps.crop(edges, 1), 1)  # the filter leaves the picture's border as it was
    return edges.point([255 if value < 32 else 0 for value in range(256)])


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """Grid of a picture's patches: patches of `stride` pixels a side, at most `max_patches`. Every picture is scaled to
    fill the budget, with the sides (multiples of `stride`) that come closest to its aspect ratio."""

    stride: int
    max_patches: int

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches for a picture of this size."""
        scale = math.sqrt(self.max_patches * self.stride**2 / (width * height))
        rows = max(1, min(self.max_patches, round(height * scale / self.stride)))
        columns = max(1, min(self.max_patches, round(width * scale / self.stride)))
        while rows * columns > self.max_patches:  # both sides were rounded up
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
    """The largest middle square of a picture, scaled to uint8 [size, size, 3]."""
    image = open_image(source, draft=(size, size))
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def check_features(pixels: np.ndarray, width: int) -> None:
    """Raises DataError for features, in the place of pixels, whose width is not the model's."""
    if pixels.dtype == np.float32 and pixels.shape[2] != width:
        raise DataError(f"Features of a picture have {pixels.shape[2]} numbers a patch, not {width}.")


def as_file(picture: Source) -> bytes:
    """The bytes of a picture's file: those given, else a PNG. Raises DataError for a path that cannot be read."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, (str, Path)):
        try:
            return Path(picture).read_bytes()
        except OSError:
            raise DataError(f"The picture {str(picture)[:200]} does not exist or cannot be read.") from None
    return png(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))


_DATA_URL = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(;base64)?,", re.I)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\r\n-]+={0,2}\s*")
_URL_SAFE = str.maketrans("-_", "+/")
_SHORTEST = 40
"""Minimum length of a picture's file in base64; shorter texts, such as paths, are taken for one only with the padding
of base64."""


def from_base64(text: str) -> bytes:
    """The bytes of a picture's file from a data URL (base64 or percent-encoded, of any type: the format follows from
    the bytes) or from bare base64. Raises DataError for anything else."""
    text = text.strip()
    head = _DATA_URL.match(text)
    content = text[head.end() :] if head else text
    try:
        if head and head[1]:
            found = decode_base64(unquote(content, errors="strict"), unpadded=True)
        else:
            found = unquote_to_bytes(content) if head else decode_base64(content)
    except ValueError:
        raise DataError("A picture is given as base64, or as a data URL: this is neither.") from None
    if len(found) > MAX_BYTES:
        raise DataError(f"A picture has more than {MAX_BYTES / 2**20:.0f} MiB.")
    return found


def decode_base64(text: str, unpadded: bool = False) -> bytes:
    """Bytes from base64: also URL-safe, with line breaks, and without padding where the text is long or `unpadded`
    allows it. Raises ValueError for anything else."""
    code = "".join(text.split()).translate(_URL_SAFE)
    if unpadded or len(code) >= _SHORTEST:
        code = code.rstrip("=")
        code += "=" * (-len(code) % 4)
    return base64.b64decode(code, validate=True)


def held_picture(text: str) -> bytes | None:
    """The bytes of the picture that a text holds, as a data URL or as base64 of a file that begins like a picture.
    None for any other text, such as a path."""
    if len(text) < _SHORTEST or not (_DATA_URL.match(text) or _BASE64.fullmatch(text)):
        return None
    try:
        content = from_base64(text)
        Image.preinit()
        with Image.open(io.BytesIO(content), formats=_FORMATS[:8]):
            return content
    except Exception:
        return None


ORIGIN = "openm6"
"""Key in the `info` of a generated picture: JSON of how it was made; its PNG file has a text of this name."""

UNCERTAIN = (
    "The model does not find in the best picture what was asked for: the wish may lie outside of what it was trained "
    "on, or contradict itself."
)
"""Message about a result whose best picture is uncertain (candidates.Candidate)."""


def seed_of_drawn(image: Image.Image) -> int:
    """The seed of a generated picture, from its ORIGIN."""
    return int(loads(image.info[ORIGIN])["options"]["seed"])


def save(image: Image.Image, target: Path | io.BytesIO, format: str | None = None) -> None:
    """Write a picture in the given format or that of its file name; a PNG with its ORIGIN."""
    told = PngInfo()
    if ORIGIN in image.info:
        told.add_itxt(ORIGIN, image.info[ORIGIN])
    image.save(target, format, pnginfo=told)


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file, with its ORIGIN."""
    buffer = io.BytesIO()
    save(image, buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Features:
    """Image features in the place of a picture: features of its patches, row by row, fp16.

    Only a model with the image encoder of this id (model/files.py) reads them; a mapping calls it `image_encoder`."""

    data: bytes
    rows: int
    columns: int
    image_encoder_id: str

    @classmethod
    def of(cls, value: Any) -> Features | None:
        """The features of a mapping, as requests and records hold them, with `features` as bytes or base64; None for
        any other value.

        Raises DataError for features of a wrong size."""
        if isinstance(value, Features) or not isinstance(value, Mapping) or "features" not in value:
            return value if isinstance(value, Features) else None
        data, rows, columns = value["features"], value.get("rows"), value.get("columns")
        try:
            data = decode_base64(data, unpadded=True) if isinstance(data, str) else data
        except ValueError:
            data = None
        if not isinstance(data, bytes):
            raise DataError("has features that are no base64.")
        if not (isinstance(rows, int) and isinstance(columns, int) and 0 < rows < 2**12 and 0 < columns < 2**12):
            raise DataError("has features without their rows and columns, whole numbers.")
        if not data or len(data) % (2 * rows * columns):
            raise DataError("has features that do not fit their rows and columns: fp16, patch by patch.")
        found = cls(data, rows, columns, str(value.get("image_encoder", "")))
        if not np.isfinite(found.array()).all():
            raise DataError("has features that are no numbers.")
        return found

    def mapping(self) -> dict[str, Any]:
        return {
            "features": self.data, "rows": self.rows, "columns": self.columns, "image_encoder": self.image_encoder_id,
        }  # fmt: skip

    def array(self) -> np.ndarray:
        """The features as fp32 [rows, columns, D]."""
        return np.frombuffer(self.data, np.float16).reshape(self.rows, self.columns, -1).astype(np.float32)

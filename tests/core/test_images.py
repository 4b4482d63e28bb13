"""Pictures: limits before decoding, damage told in our own words, sizes that keep the aspect ratio."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from openm6.core.errors import DataError
from openm6.core.images import _FORMATS, PICTURES, Features, ImageGrid, from_base64, open_image, sketch


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def huge_png(width: int = 50_000, height: int = 50_000) -> bytes:
    """A whole PNG of 50,000 x 50,000 black pixels in a few megabytes at most, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    line = bytes(1 + width // 8)
    packed = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_picture_of_50000_by_50000_pixels_is_refused_by_its_header() -> None:
    with pytest.raises(DataError, match=r"50000 x 50000 pixels; at most 50 million|more than 50 million pixels"):
        open_image(huge_png())


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.jpg"
    with path.open("wb") as file:
        file.truncate(40 * 2**20)
    with pytest.raises(DataError, match="has 40 MiB; at most 32 MiB are read"):
        open_image(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_told(share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG"):
        whole = encoded(noise, format)
        with pytest.raises(DataError, match="^The picture is (truncated or damaged|in no picture format)"):
            open_image(whole[: int(len(whole) * share)])


def test_what_is_no_picture_and_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is in no picture format that is known here"):
        open_image(b"hello")
    with pytest.raises(DataError, match="gone.jpg does not exist or cannot be read"):
        open_image(tmp_path / "gone.jpg")


@given(st.binary(max_size=300))
def test_any_bytes_give_a_picture_or_a_data_error(content: bytes) -> None:
    try:
        open_image(content)
    except DataError as error:
        assert "0x" not in str(error)


def test_transparency_lies_on_white_and_exif_turns_upright() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(open_image(encoded(clear))).tolist() == [[[255, 255, 255]] * 2] * 2
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = open_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif))
    assert turned.size == (2, 4)


def grey(image: Image.Image | bytes) -> list[int]:
    """The first row of a picture that has to be grey."""
    pixels = np.asarray(open_image(image))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


RAMP = np.array([[0, 257, 32896, 65535]], np.uint16)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG2000"])
def test_grey_of_16_bits_is_scaled_by_its_full_range(format: str) -> None:
    options = {"irreversible": False} if format == "JPEG2000" else {}
    assert grey(encoded(Image.fromarray(RAMP), format, **options)) == [0, 1, 128, 255]


def test_other_kinds_of_16_bits_are_scaled_too() -> None:
    big = Image.frombytes("I;16B", (4, 1), RAMP.astype(">u2").tobytes())
    assert grey(big) == grey(encoded(big, "TIFF")) == [0, 1, 128, 255]
    assert grey(b"P5 4 1 65535\n" + RAMP.astype(">u2").tobytes()) == [0, 1, 128, 255]
    dark = b"P5 2 1 4095\n" + np.array([[0, 2048]], ">u2").tobytes()
    assert grey(dark) == [0, 128]


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (np.array([[0, 200, 255]], np.int32), [0, 200, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[1000, 51000, 101000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.2, 1]], np.float32), [0, 51, 255]),
        (np.array([[0.5, 0.5, 0.5]], np.float32), [128, 128, 128]),
        (np.array([[2, 4, 7]], np.float32), [0, 102, 255]),
        (np.array([[np.nan, 0, 10]], np.float32), [0, 0, 255]),
    ],
)  # fmt: skip
def test_values_of_32_bits_are_taken_as_they_are_meant_or_from_smallest_to_largest(
    values: np.ndarray, seen: list[int]
) -> None:
    image = Image.fromarray(values)
    assert grey(image) == grey(encoded(image, "TIFF")) == seen


def test_one_transparent_value_of_16_bits_lies_on_white() -> None:
    clear = encoded(Image.fromarray(RAMP), transparency=257)
    assert np.asarray(open_image(clear))[0, :, 0].tolist() == [0, 255, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_of_every_mode_lies_on_white_in_files_and_in_memory(mode: str) -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    clear.putpixel((0, 0), (0, 0, 0, 0))
    image = clear.quantize() if mode == "P" else (clear.convert("P") if mode == "PA" else clear).convert(mode)
    assert grey(image) == [255, 0]
    if mode != "PA":
        assert grey(encoded(image)) == [255, 0]
        assert open_image(encoded(image), alpha=True).mode == ("LA" if mode == "LA" else "RGBA")


def test_colours_of_print_video_and_lab_become_rgb() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    for image in (red.convert("CMYK"), red.convert("YCbCr"), red.convert("HSV")):
        assert np.abs(np.asarray(open_image(image)).astype(int) - [200, 30, 30]).max() <= 8
    for format in ("JPEG", "TIFF"):
        shown = np.asarray(open_image(encoded(red.convert("CMYK"), format)))
        assert np.abs(shown.astype(int) - [200, 30, 30]).max() <= 8
    white = open_image(encoded(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"))
    assert min(white.getpixel((0, 0))) >= 250


def test_a_picture_in_memory_is_turned_upright_and_limited_as_its_file_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        assert open_image(image).size == (2, 4)
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    with Image.open(io.BytesIO(noise[:-2000])) as image, pytest.raises(DataError, match="truncated or damaged"):
        open_image(image)


@pytest.mark.parametrize("value", [["a.jpg"], {"a": 1}, 7, None])
def test_values_that_are_no_pictures_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="has to be a path or the bytes of a file"):
        open_image(value)


def test_endings_and_formats_are_those_that_pillow_opens() -> None:
    known = {ending for ending, name in Image.registered_extensions().items() if name in _FORMATS}
    assert known - {".avifs"} == set(PICTURES)
    assert set(_FORMATS) <= set(Image.OPEN)


def test_no_program_inside_a_file_is_run() -> None:
    with pytest.raises(DataError, match="no picture format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF")


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([4, 16, 64, 256]))
def test_the_grid_keeps_the_budget_and_the_shape(width: int, height: int, budget: int) -> None:
    rows, columns = ImageGrid(stride=16, max_patches=budget).fit(width, height)
    assert 1 <= rows * columns <= budget
    if max(width, height) <= 2 * min(width, height):
        assert rows * columns >= budget / 3
        assert 0.3 < (columns / rows) / (width / height) < 3.4


def test_pictures_are_scaled_to_their_grid() -> None:
    pixels = ImageGrid(stride=16, max_patches=16).read(encoded(Image.new("RGB", (300, 100))))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 112, 3)


def test_a_sketch_has_lines_where_colours_change() -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[16:48, 16:48] = (200, 30, 30)
    lines = np.asarray(sketch(pixels, 64)) == 0
    assert lines[15:17, 20:44].any(0).all() and lines[20:44, 47:49].any(1).all()
    assert not lines[22:42, 22:42].any() and not lines[:10].any() and not lines[:, -10:].any()
    assert sketch(pixels, 32).size == (32, 32)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 99))
def test_features_go_and_come(rows: int, columns: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(rows, columns, width)).astype(np.float16)
    features = Features(values.tobytes(), rows, columns, "image_encoder")
    sent = {**features.mapping(), "features": base64.b64encode(features.data).decode()}
    for given_ in (features, features.mapping(), sent):
        found = Features.of(given_)
        assert found == features and (found.array() == values).all() and found.array().dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"features": "###"}, "no base64"), ({"features": b""}, "do not fit"), ({"features": b"abc"}, "do not fit"),
        ({"features": 7}, "no base64"), ({"rows": 0}, "rows and columns"), ({"rows": "1"}, "rows and columns"),
        ({"columns": 10**9}, "rows and columns"),
        ({"features": np.full(4, np.nan, np.float16).tobytes()}, "no numbers"),
    ],
)  # fmt: skip
def test_features_that_are_none(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Features.of({"features": bytes(8), "rows": 2, "columns": 2, "image_encoder": "", **changes})


def test_no_features() -> None:
    assert Features.of(b"a picture") is None and Features.of({"url": "data:"}) is None and Features.of(None) is None


FILE = bytes(range(256)) * 2 + b"?>"  # with + and / in base64, and padding
CODE = base64.b64encode(FILE).decode()


@pytest.mark.parametrize(
    "text",
    [
        CODE, base64.encodebytes(FILE).decode(), CODE.replace("A", "A\r\n"), base64.urlsafe_b64encode(FILE).decode(),
        base64.urlsafe_b64encode(FILE).decode().rstrip("="), f"data:image/png;base64,{CODE}", f" data:;base64,{CODE}\n",
        f"data:application/octet-stream;base64,{CODE}", f"DATA:image/jpeg;charset=utf-8;base64,{CODE}",
        f"data:image/png;name=a.png;base64,{quote(CODE, safe='')}", f"data:image/png,{quote(FILE)}",
        f"data:image/png;base64,{CODE.rstrip('=')}",
    ],
)  # fmt: skip
def test_base64_in_all_its_forms(text: str) -> None:
    assert from_base64(text) == FILE


@pytest.mark.parametrize(
    "text",
    ["/etc/passwd", "a.png", "data:image/png", "data:base64,AAAA", CODE + "!", "data:image/png;base64,%ff", "红"],
)
def test_texts_that_are_no_base64(text: str) -> None:
    with pytest.raises(DataError, match="neither"):
        from_base64(text)

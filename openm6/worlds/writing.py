"""Pictures of written Chinese: two to four simple characters, drawn stroke by stroke, so that no font is needed.

Strokes are jittered, slanted, and of different width and colour from word to word. A fifth of the words, determined by
their characters, occurs in the test split only. Records: image (PNG, 32 pixels high and 32 a character wide), text."""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import Image, ImageDraw

from openm6.data.store import Record, check_split
from openm6.worlds.draw import apart

HEIGHT = 32
_FINE = 4  # scale at which strokes are drawn, before reduction
RECORDS = {"train": 8_000, "validation": 500, "test": 500}
SPLITS = tuple(RECORDS)

# Strokes of a character: corners on a grid of 10 x 10, x and y a digit each.
STROKES = {
    "一": "15,85", "二": "23,73 17,87", "三": "22,72 25,75 18,88", "十": "15,85 51,59", "工": "22,72 52,58 18,88",
    "土": "24,74 51,58 18,88", "王": "22,72 25,75 52,58 18,88", "上": "41,48 44,74 18,88",
    "下": "12,82 52,59 54,76", "口": "22,28,78,72,22", "日": "31,39,69,61,31 35,65",
    "目": "31,39,69,61,31 34,64 36,66", "田": "21,28,78,71,21 25,75 51,58", "山": "24,28,78,74 51,58",
    "中": "23,26,76,73,23 51,59", "大": "14,84 51,54,19 54,89", "小": "51,58,47 34,16 64,86",
    "人": "51,54,19 54,89", "八": "42,37,19 62,67,89", "木": "13,83 51,59 53,17 53,87",
    "本": "13,83 51,59 53,17 53,87 37,67", "天": "22,72 15,85 52,55,19 55,89",
    "元": "32,62 14,84 44,46,19 64,68,88,86", "生": "31,14 23,73 25,75 51,58 18,88",
    "平": "22,72 33,44 63,54 16,86 52,59", "正": "22,72 52,58 55,75 35,38 18,88", "千": "61,32 15,85 51,59",
    "万": "12,82 42,45,19 45,75,79,59", "开": "22,72 15,85 32,35,29 62,69", "水": "51,58,47 13,33,17 73,54 53,88",
    "火": "51,54,19 54,89 23,34 73,64", "月": "31,36,29 31,71,79,69 34,74 36,76", "力": "14,74,78,58 41,45,19",
    "子": "22,72,54 54,59,49 15,85", "女": "41,25,78 72,57,19 14,84", "手": "62,31 24,74 16,86 51,59,48",
    "心": "25,17 34,38,68,66 53,54 72,83", "白": "51,33 33,39,79,73,33 36,76",
    "早": "31,35,75,71,31 33,73 17,87 55,59", "古": "13,83 51,55 35,39,69,65,35",
    "石": "12,82 42,17 35,39,79,75,35", "米": "22,33 72,63 14,84 51,59 54,18 54,88",
    "出": "22,25,75,72 51,59 16,19,89,86",
}  # fmt: skip
_INKS = ((24, 24, 28), (150, 30, 30), (28, 60, 140), (24, 96, 52), (240, 236, 226))
_PAPERS = ((244, 240, 230), (226, 232, 240), (236, 220, 200), (70, 74, 84), (110, 60, 56))


def open_writing(split: str = "train", seed: int = 0, records: int | None = None) -> Writing:
    """The records of a split. Raises UsageError for an unknown one."""
    check_split("The writing has", split, SPLITS)
    return Writing(split, seed, records)


class Writing:
    """The records of a split; each is determined by seed, split and number."""

    columns = ("image", "text")

    def __init__(self, split: str, seed: int = 0, records: int | None = None):
        self._split, self._seed = split, seed
        self._count = RECORDS[split] if records is None else records

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), index])
        known = list(STROKES)
        while True:
            text = "".join(known[i] for i in rng.integers(len(known), size=rng.integers(2, 5)))
            if (zlib.crc32(text.encode()) % 5 == 0) == (self._split == "test"):
                break
        return {"_where": f"writing/{self._split}#{index}", "image": write(text, rng), "text": text}


def write(text: str, rng: np.random.Generator) -> bytes:
    """The picture of a text as PNG bytes."""
    side = HEIGHT * _FINE
    paper = _PAPERS[rng.integers(len(_PAPERS))]
    ink = apart(_INKS, [paper], rng, 150.0)
    picture = Image.new("RGB", (side * len(text), side), paper)
    pen = ImageDraw.Draw(picture)
    width, slant, shake = rng.uniform(6, 11), rng.uniform(-0.18, 0.18), rng.uniform(1, 3.5)
    for number, character in enumerate(text):
        size = side * rng.uniform(0.078, 0.094)
        left, top = number * side + (side - 10 * size) / 2 + rng.uniform(-5, 5), (side - 10 * size) / 2
        for stroke in STROKES[character].split():
            corners = np.array([[int(c[0]), int(c[1])] for c in stroke.split(",")], float)
            corners = corners * size + rng.normal(0, shake, corners.shape)
            corners[:, 0] += slant * (side / 2 - corners[:, 1])
            points = [(left + x, top + y) for x, y in corners.tolist()]
            pen.line(points, fill=ink, width=round(width), joint="curve")
            for x, y in points:
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=ink)
    pixels = np.asarray(picture.reduce(_FINE), np.float32) + rng.normal(0, 5, (HEIGHT, HEIGHT * len(text), 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()

"""Handwritten digits as pictures: the 1,797 real ones of scikit-learn, with questions and captions.

Source of the digits: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998. The split
is fixed and stratified: every fifth record of each digit is a test record."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

from openm6.core.extras import require
from openm6.data.store import ListRecords, Record, Records, check_split

SPLITS = ("train", "test")
SIDE = 64
NAMES = "零一二三四五六七八九"

_QUESTIONS = (
    "图中的数字是几？", "这是数字几？", "图片里写的是哪个数字？", "这个手写数字是几？", "图里写的是几？",
    "请问这是几？",
)  # fmt: skip
_CAPTIONS = (
    "手写的数字{d}。", "图中是一个手写的{d}。", "一个手写数字：{d}。",
    "图片里写着数字{d}。", "这是数字{d}({n})。", "有人写下了一个{d}。",
)  # fmt: skip


@cache
def open_digits(split: str = "train") -> Records:
    """Records: image (PNG bytes, 64 x 64), question, answer ("7"), caption (six), label ("7"), kind ("digit").

    Raises UsageError for an unknown split.
    """
    check_split("The digits have", split, SPLITS)
    require("demo", "sklearn")
    from sklearn.datasets import load_digits

    data = load_digits()
    seen = [0] * 10
    records = []
    for index, (pixels, digit) in enumerate(zip(data.images, data.target.tolist(), strict=True)):
        test = seen[digit] % 5 == 4
        seen[digit] += 1
        if test == (split == "test"):
            records.append(_record(split, index, pixels, digit))
    return ListRecords(records)


def _record(split: str, index: int, pixels: np.ndarray, digit: int) -> Record:
    # Ink is 0 to 16 on 8 x 8 points: rendered dark on white, smoothly enlarged.
    small = Image.fromarray((255 - pixels * (255 / 16)).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=1)
    return {
        "_where": f"digits/{split}#{index}",
        "image": buffer.getvalue(),
        "question": _QUESTIONS[index % len(_QUESTIONS)],
        "answer": str(digit),
        "caption": [c.format(d=digit, n=NAMES[digit]) for c in _CAPTIONS],
        "label": str(digit),
        "kind": "digit",
    }

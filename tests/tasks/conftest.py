"""A small tokenizer and pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.library import get, names
from openm6.tasks.processor import Processor


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [text for name in names() if not name.endswith("_en") for text in get(name).texts()]
    characters = "红黄蓝绿色条纹圆点连衣裙帽子包图中的商品是什么左右上下边在有一二两件。，？"
    return Tokenizer.train(texts, 900, num_codes=16, alphabet=characters)


@pytest.fixture(scope="session")
def processor(tokenizer: Tokenizer) -> Processor:
    return Processor(tokenizer, ImageGrid(stride=8, max_patches=16), max_length=64)


def picture(width: int = 32, height: int = 32, seed: int = 0) -> bytes:
    """A JPEG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()

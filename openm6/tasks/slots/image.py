"""A picture: `<|image|>`, a `<|patch|>` for each of its patches, `<|/image|>`; generated, `<|image|>` and its codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from openm6.core.errors import DataError, UsageError
from openm6.core.images import Features
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor

if TYPE_CHECKING:
    from openm6.tasks.pictures import PictureCodec


def schema() -> dict[str, Any]:
    return {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/*"}


def source(value: Any, processor: Processor) -> Piece:
    """Encode a path, the bytes of a file, an array, a PIL image, or image features (images.Features)."""
    tokenizer, grid = processor.tokenizer, processor.grid
    if (features := Features.of(value)) is not None:
        patches = features.rows * features.columns
        if patches > grid.max_patches:
            raise DataError(f"has features of {patches} patches; the model reads at most {grid.max_patches}.")
        return Piece([tokenizer.image_id, *[tokenizer.patch_id] * patches, tokenizer.image_end_id], features.array())
    _check(value)
    pixels = grid.read(value)
    patches = (pixels.shape[0] // grid.stride) * (pixels.shape[1] // grid.stride)
    return Piece([tokenizer.image_id, *[tokenizer.patch_id] * patches, tokenizer.image_end_id], pixels)


def target(value: Any, processor: Processor) -> Sequence[int]:
    """Encode a picture as in `source`, or its codes, a list of numbers."""
    codec, start = _codec(processor), processor.tokenizer.code_start
    if isinstance(value, list):
        return [processor.tokenizer.image_id, *(start + _checked_codes(value, codec)).tolist()]
    _check(value)
    return [processor.tokenizer.image_id, *(start + codec.encode(value)).tolist()]


def read(ids: Sequence[int], processor: Processor) -> Image.Image:
    """The picture of the codes among `ids`."""
    start = processor.tokenizer.code_start
    codes = np.array([i - start for i in ids if i >= start], np.int64)
    return _codec(processor).decode(codes)


def _codec(processor: Processor) -> PictureCodec:
    if processor.codec is None:
        raise UsageError("this model has no image codec: it was not trained to draw (model.codec in its recipe).")
    return processor.codec


def _checked_codes(value: list[Any], codec: PictureCodec) -> np.ndarray:
    codes, count = np.array(value), codec.side**2
    fits = codes.shape == (count,) and codes.dtype.kind in "iu"
    if not fits or codes.min() < 0 or codes.max() >= codec.num_codes:
        raise DataError(f"has to be a picture, or {count} codes from 0 to {codec.num_codes - 1}.")
    return codes


def _check(value: Any) -> None:
    if not isinstance(value, (str, Path, bytes, np.ndarray, Image.Image)):
        raise DataError(f"has to be a picture (a path or the bytes of a file), not {type(value).__name__}.")
    if isinstance(value, (str, bytes)) and not value:
        raise DataError("is empty.")

"""Text, with or without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.layout import Piece
from openm6.tasks.processor import Processor


def schema() -> dict[str, Any]:
    return {"type": "string"}


def source(value: Any, processor: Processor) -> Piece:
    """Encode a text, or a text with gaps (a tuple of pieces, see `corrupt`), each gap as one `<|mask|>`."""
    if isinstance(value, tuple):
        ids = processor.tokenizer.encode(value[0])
        for piece in value[1:]:
            ids.append(processor.tokenizer.mask_id)
            ids += processor.tokenizer.encode(piece)
    else:
        ids = processor.tokenizer.encode(as_text(value))
    return Piece(ids, cuttable=True)


def target(value: Any, processor: Processor) -> Sequence[int]:
    return processor.tokenizer.encode(as_text(value))


def read(ids: Sequence[int], processor: Processor) -> str:
    return processor.tokenizer.decode(ids)


def as_text(value: Any) -> str:
    """A string, or a number as a string. Raises DataError for anything else and for the empty string."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"has to be a text, not {type(value).__name__}.")
    if not value:
        raise DataError("is empty.")
    return value

"""Text, with or without gaps."""

import json
from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor


def schema() -> dict[str, Any]:
    return {"type": "string"}


def source(value: Any, processor: Processor) -> Piece:
    """Encode a text, or a text with gaps (a tuple of pieces, see `corrupt`), each gap as one `<|mask|>`."""
    if isinstance(value, tuple) and processor.chat:
        return spoken("____".join(value), processor, cuttable=True)
    if isinstance(value, tuple):
        ids = processor.tokenizer.encode(value[0])
        for piece in value[1:]:
            ids.append(processor.tokenizer.mask_id)
            ids += processor.tokenizer.encode(piece)
        return Piece(ids, cuttable=True)
    return spoken(as_text(value), processor, cuttable=True)


def spoken(text: str, processor: Processor, cuttable: bool = False) -> Piece:
    """A plain text as a piece; a chat template encodes it with its neighbours."""
    if processor.chat:
        return Piece((), cuttable=cuttable, text=text)
    return Piece(processor.tokenizer.encode(text), cuttable=cuttable)


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


def from_json(value: Any, error: str) -> Any:
    """A value, or the one that a text holds as JSON. Raises DataError(error) for a text that is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(error) from None


def find_json(ids: Sequence[int], processor: Processor) -> Any:
    """The JSON in a generated text, from its first bracket on. Raises DataError where there is none."""
    text = processor.tokenizer.decode(ids)
    start = min((place for sign in "[{" if (place := text.find(sign)) >= 0), default=len(text))
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        raise DataError("is no JSON.") from None

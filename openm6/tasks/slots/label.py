"""A label: a short text of a closed set. Which set, the task knows; decoding is kept to it by a trie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openm6.tasks.layout import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.text import as_text


def schema() -> dict[str, Any]:
    return {"type": "string"}


def source(value: Any, processor: Processor) -> Piece:
    return Piece(processor.tokenizer.encode_often(as_text(value)))


def target(value: Any, processor: Processor) -> Sequence[int]:
    return processor.tokenizer.encode_often(as_text(value))


def read(ids: Sequence[int], processor: Processor) -> str:
    return processor.tokenizer.decode(ids)

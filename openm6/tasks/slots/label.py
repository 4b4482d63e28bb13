"""A label: a short text of a closed set, which the task defines; decoding is restricted to it by a trie."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.layout import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.text import as_text


def schema() -> dict[str, Any]:
    return {"type": "string"}


def normalize_label(text: str) -> str:
    """The canonical spelling of a label: Unicode's form NFKC (full-width letters, digits and punctuation become
    half-width, in Chinese labels too), blanks collapsed and stripped. Case matters."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def source(value: Any, processor: Processor) -> Piece:
    return Piece(target(value, processor))


def target(value: Any, processor: Processor) -> Sequence[int]:
    label = normalize_label(as_text(value))
    if not label:
        raise DataError("is empty.")
    return processor.tokenizer.encode_often(label)


def read(ids: Sequence[int], processor: Processor) -> str:
    return processor.tokenizer.decode(ids)

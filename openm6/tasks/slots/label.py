"""A label: a short text of a closed set, which the task defines; decoding is restricted to it by a trie."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.text import as_text, read, schema, spoken

__all__ = ["normalize_label", "read", "schema", "source", "target"]


def normalize_label(text: str) -> str:
    """The canonical spelling of a label: Unicode's form NFKC (full-width letters, digits and punctuation become
    half-width, in Chinese labels too), blanks collapsed and stripped. Case matters."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def source(value: Any, processor: Processor) -> Piece:
    return spoken(_label(value), processor)


def target(value: Any, processor: Processor) -> Sequence[int]:
    return processor.tokenizer.encode_often(_label(value))


def _label(value: Any) -> str:
    label = normalize_label(as_text(value))
    if not label:
        raise DataError("is empty.")
    return label

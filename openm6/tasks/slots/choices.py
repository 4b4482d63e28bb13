"""The labels of which an answer is one, in their order: 蕴含、矛盾、无关."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.label import normalize_label, read
from openm6.tasks.slots.text import from_json, spoken

__all__ = ["as_choices", "read", "schema", "source", "target"]


def schema() -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string"}, "minItems": 1}


def source(value: Any, processor: Processor) -> Piece:
    return spoken(_listed(value), processor)


def target(value: Any, processor: Processor) -> Sequence[int]:
    """Encode labels as a tuple, whose spelling is canonical, or as `as_choices` takes them."""
    return processor.tokenizer.encode_often(_listed(value))


def _listed(value: Any) -> str:
    labels = value if isinstance(value, tuple) else as_choices(value)
    wide = any(unicodedata.east_asian_width(character) in "WF" for label in labels for character in label)
    return ("、" if wide else ", ").join(labels)


def as_choices(value: Any) -> tuple[str, ...]:
    """The labels of a list, or of a text with commas between them, or of the JSON of a list. Raises DataError."""
    problem = "has to be a list of labels, as in 红色,蓝色."
    if isinstance(value, str):
        value = from_json(value, problem) if value.lstrip().startswith("[") else normalize_label(value).split(",")
    if not isinstance(value, (list, tuple)) or not all(isinstance(label, (str, int, float)) for label in value):
        raise DataError(problem)
    labels = tuple(dict.fromkeys(normalize_label(str(label)) for label in value))
    if not labels or not all(labels):
        raise DataError("is empty, or has an empty label.")
    return labels

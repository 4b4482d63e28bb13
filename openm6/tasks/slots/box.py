"""A box in a picture: known to the grammar, not yet to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from openm6.errors import UsageError
from openm6.tasks.processor import Processor


def schema() -> dict[str, Any]:
    """Left, top, right, bottom as shares of the picture's width and height."""
    return {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 4, "maxItems": 4}


def source(value: Any, processor: Processor) -> NoReturn:
    raise UsageError("this version does not read or write boxes yet.")


def target(value: Any, processor: Processor) -> NoReturn:
    source(value, processor)


def read(ids: Sequence[int], processor: Processor) -> NoReturn:
    source(ids, processor)

"""A vector that stands for the input: known to the grammar, not yet to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from openm6.errors import UsageError
from openm6.tasks.processor import Processor


def schema() -> dict[str, Any]:
    return {"type": "array", "items": {"type": "number"}}


def source(value: Any, processor: Processor) -> NoReturn:
    raise UsageError("this version does not read or write vectors yet.")


def target(value: Any, processor: Processor) -> NoReturn:
    source(value, processor)


def read(ids: Sequence[int], processor: Processor) -> NoReturn:
    source(ids, processor)

"""A vector that represents the input: the network's output where the answer would begin, at length 1.

It has no tokens: it is neither generated nor an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from openm6.core.errors import UsageError
from openm6.tasks.processor import Processor


def schema() -> dict[str, Any]:
    return {"type": "array", "items": {"type": "number"}}


def source(value: Any, processor: Processor) -> NoReturn:
    raise UsageError("a vector is what a model gives, and cannot be given to it.")


def target(value: Any, processor: Processor) -> NoReturn:
    raise UsageError("a vector is not written in tokens.")


def read(ids: Sequence[int], processor: Processor) -> NoReturn:
    raise UsageError("a vector is not written in tokens.")

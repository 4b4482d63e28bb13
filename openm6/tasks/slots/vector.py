"""A vector that represents the input: the network's output where the answer would begin, at length 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from openm6.core.errors import UsageError
from openm6.tasks.processor import Processor


class OutputSlot:
    """A slot type whose values are read from the network's output: without tokens, neither generated nor an input."""

    def __init__(self, name: str, schema: Callable[[], dict[str, Any]]):
        self._name, self.schema = name, schema

    def source(self, value: Any, processor: Processor) -> NoReturn:
        raise UsageError(f"{self._name} is what a model gives, and cannot be given to it.")

    def target(self, value: Any, processor: Processor) -> NoReturn:
        raise UsageError(f"{self._name} is not written in tokens.")

    def read(self, ids: Sequence[int], processor: Processor) -> NoReturn:
        raise UsageError(f"{self._name} is not written in tokens.")


VECTOR = OutputSlot("a vector", lambda: {"type": "array", "items": {"type": "number"}})

"""The slot types, a file each. A type is a module, or an object, with the functions of `SlotType`."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from openm6.core.errors import UsageError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots import box, choices, image, label, messages, table, text, triples


class SlotType(Protocol):
    """Functions of a slot type. Encoders raise DataError for an invalid value, UsageError for an unsupported one."""

    def schema(self) -> dict[str, Any]:
        """JSON schema of a value."""

    def source(self, value: Any, processor: Processor) -> Piece:
        """Encode a value as input."""

    def target(self, value: Any, processor: Processor) -> Sequence[int]:
        """Encode a value as the model has to write it."""

    def read(self, ids: Sequence[int], processor: Processor) -> Any:
        """The value that the model wrote."""


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
"""A vector that represents the input: the network's output where the answer would begin, at length 1."""

TYPES: dict[str, SlotType] = {
    "text": text, "image": image, "label": label, "choices": choices, "table": table, "triples": triples, "box": box,
    "vector": VECTOR, "messages": messages,
}  # fmt: skip

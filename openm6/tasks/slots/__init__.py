"""The slot types, a file each. A type is a module with the functions of `SlotType`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from openm6.tasks.layout import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots import box, image, label, table, text, triples, vector


class SlotType(Protocol):
    """Functions of a slot type. Both encoders raise DataError for an invalid value, and UsageError for an unsupported
    one."""

    def schema(self) -> dict[str, Any]:
        """JSON schema of a value."""

    def source(self, value: Any, processor: Processor) -> Piece:
        """Encode a value as input."""

    def target(self, value: Any, processor: Processor) -> Sequence[int]:
        """Encode a value as the model has to write it."""

    def read(self, ids: Sequence[int], processor: Processor) -> Any:
        """The value that the model wrote."""


TYPES: dict[str, SlotType] = {
    "text": text, "image": image, "label": label, "table": table, "triples": triples, "box": box, "vector": vector,
}  # fmt: skip

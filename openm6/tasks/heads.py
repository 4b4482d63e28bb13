"""Heads: answers that are numbers from a linear layer on the network's output.

A head is a slot type: `register_head("depth", Depth())` makes `[image:photo] -> [depth:order]` a task. The model stores
the layer's weights; the rest is the user's code, registered wherever the model is used (`openm6.tasks.extend`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from openm6.core.errors import UsageError
from openm6.tasks import slots
from openm6.tasks.grammar import ATTRIBUTES
from openm6.tasks.processor import Processor

if TYPE_CHECKING:
    from torch import Tensor


class Head(Protocol):
    """The loss and the reading of a head's `outputs` numbers."""

    outputs: int

    def schema(self) -> dict[str, Any]:
        """JSON schema of a value."""

    def numbers(self, value: Any) -> list[float]:
        """A value of the data as a fixed number of numbers. Raises DataError for an invalid value."""

    def loss(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """The loss of each example, [N], from outputs, fp32 [N, outputs], and results of `numbers`, fp32 [N, any]."""

    def read(self, outputs: list[float]) -> Any:
        """The answer from the outputs."""


HEADS: dict[str, Head] = {}
"""Heads by slot type."""


class _HeadSlot:
    """The slot type of a head, which has no tokens."""

    def __init__(self, head: Head):
        self.schema = head.schema

    def source(self, value: Any, processor: Processor) -> NoReturn:
        raise UsageError("what a head gives cannot be given to the model.")

    def target(self, value: Any, processor: Processor) -> NoReturn:
        raise UsageError("what a head gives is not written in tokens.")

    def read(self, ids: Sequence[int], processor: Processor) -> NoReturn:
        raise UsageError("what a head gives is not written in tokens.")


def register_head(name: str, head: Head) -> None:
    """Make `name` a slot type whose values come from a head. Raises UsageError for a name that is taken."""
    if not name.isidentifier() or (name in slots.TYPES and name not in HEADS):
        raise UsageError(f"{name!r} cannot name a head: it is no name, or a slot type already.")
    if head.outputs < 1:
        raise UsageError(f"The head {name} has {head.outputs} outputs; it needs at least 1.")
    HEADS[name] = head
    slots.TYPES[name] = _HeadSlot(head)
    ATTRIBUTES[name] = frozenset({"drop"})

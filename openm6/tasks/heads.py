"""Heads: answers that are numbers from a linear layer on the network's output.

A head is a slot type: `register_head("depth", Depth())` makes `[image:photo] -> [depth:order]` a task. The model stores
the layer's weights; the rest is the user's code, registered wherever the model is used (`openm6.tasks.extend`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from openm6.core.errors import UsageError
from openm6.tasks import slots
from openm6.tasks.grammar import ATTRIBUTES

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


def register_head(name: str, head: Head) -> None:
    """Make `name` a slot type whose values come from a head. Raises UsageError for a name that is taken."""
    if not name.isidentifier() or (name in slots.TYPES and name not in HEADS):
        raise UsageError(f"{name!r} cannot name a head: it is no name, or a slot type already.")
    if head.outputs < 1:
        raise UsageError(f"The head {name} has {head.outputs} outputs; it needs at least 1.")
    HEADS[name] = head
    slots.TYPES[name] = slots.OutputSlot("the value of a head", head.schema)
    ATTRIBUTES[name] = frozenset({"drop"})

"""Answers that are numbers from a head of their own: a linear layer on what the network has made of the input.

A head is a slot type: `register_head("depth", Depth())` makes `[image:photo] -> [depth:order]` a task. The model has
the layer's weights; the rest is yours, and has to be registered wherever the model is used (`openm6.tasks.extend`).
"""

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
    """What a head does with its `outputs` numbers."""

    outputs: int

    def schema(self) -> dict[str, Any]:
        """JSON schema of a value."""

    def numbers(self, value: Any) -> list[float]:
        """A value of the data as numbers, always as many. Raises DataError for one that is none."""

    def loss(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Of outputs, fp32 [N, outputs], against what `numbers` gave, fp32 [N, any]: the loss of each, [N]."""

    def read(self, outputs: list[float]) -> Any:
        """The answer."""


HEADS: dict[str, Head] = {}
"""By slot type."""


class _HeadSlot:
    """A head as a slot type: nothing of it is tokens."""

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

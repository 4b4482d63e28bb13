"""The protocol between the one training loop (train/trainer.py) and what it trains: network, examples, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from openm6.data.loader import Loader
from openm6.model.experts import RouterStatistics
from openm6.train.report import Losses


@dataclass(slots=True)
class MicroBatchResult:
    """Losses and size of a micro-batch.

    loss               weighted sum over all that is trained, with gradients
    losses             unweighted sums by task and source: (task, source, sum, number)
    flops              of the forward and backward pass
    positions          processed by the network, without padding
    padded_positions   with padding
    router_statistics  of each expert layer
    """

    loss: Tensor
    losses: Losses
    flops: float
    positions: int
    padded_positions: int
    router_statistics: list[RouterStatistics] = field(default_factory=list)


class Objective(Protocol):
    """`path`: the model directory to start from; None starts at random. `notes`: sentences shown to the user before the
    first step. `initialize` and `gather` do nothing unless an objective says otherwise."""

    path: Path | None
    notes: list[str]
    loader: Loader

    def network(self, shared: bool) -> Any:
        """The network (a module), without memory; `shared`: of the Pseudo stage of Pseudo-to-Real."""

    def initialize(self, model: Any) -> None:
        """Set parameters that start neither at random nor from `path`."""
        return

    def loss_weight(self, examples: list[Any]) -> tuple[float, int, int]:
        """Total weight of what is trained of the examples (a step's loss is divided by it), number of positions, and
        number of examples that were longer than the model takes."""

    def micro_batches(self, examples: list[Any]) -> list[list[Any]]:
        """The examples divided into micro-batches, as many on every process (some may be empty)."""

    def micro_batch_loss(self, run: Callable[[Any], Any], examples: list[Any]) -> MicroBatchResult:
        """Losses of a micro-batch, by one forward pass `run` of the network. Every process makes the same collective
        calls, whatever its examples are."""

    def evaluate(self, model: Any) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Metrics by source, between two steps."""

    def gather(self) -> None:
        """Merge what the processes have recorded separately, before a checkpoint."""
        return

    def describe(self, path: Path) -> None:
        """Write all files of a model directory except the weights."""

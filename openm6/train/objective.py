"""What a run trains: the one loop (train/trainer.py) asks its objective for a network, examples, and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from openm6.data.loader import Loader
from openm6.train.report import Losses


@dataclass(slots=True)
class Part:
    """What a part of a step gave.

    loss        sum over all that is trained, by weight, with gradients
    losses      the same by task and source, unweighted: (task, source, sum, number)
    loads       of each layer of experts
    flops       of the forward and backward pass
    positions   that the network worked on; `slots` with those that only fill rows
    """

    loss: Tensor
    losses: Losses
    flops: float
    positions: int
    slots: int
    loads: list[Any] = field(default_factory=list)


class Objective(Protocol):
    """`path`: the model directory to start from; None starts at random. `notes`: sentences that the user reads before
    the first step."""

    path: Path | None
    notes: list[str]
    loader: Loader

    def network(self, shared: bool) -> Any:
        """The network (a module), without memory; `shared`: of the first stage of Pseudo-to-Real."""

    def begin(self, model: Any) -> None:
        """Change what starts otherwise than at random or by `path`."""

    def count(self, examples: list[Any]) -> tuple[float, int, int]:
        """What of these examples is trained, by weight (a step's loss is divided by that), positions in all, and
        examples that were longer than the model takes."""

    def batches(self, examples: list[Any]) -> list[list[Any]]:
        """The examples divided into micro-batches, as many on every process (some may be empty)."""

    def part(self, run: Callable[[Any], Any], examples: list[Any]) -> Part:
        """Losses of a micro-batch; `run` is the network's forward."""

    def evaluate(self, model: Any) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Figures by source, between two steps."""

    def gather(self) -> None:
        """Bring together what the processes have seen apart, before a checkpoint."""

    def describe(self, path: Path) -> None:
        """Write all of a model directory but the weights."""

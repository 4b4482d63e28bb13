"""The result of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from openm6.model.experts import RouterStatistics


@dataclass
class Output:
    """The result of a forward pass.

    loss               sum of the losses of all M trained positions, each times its example's weight (to be divided by
                       the sum of the weights over all processes)
    losses             fp32 [M], loss of each position, without gradient
    segments           int64 [M], number of its example in the batch, from 1
    hidden             [B, T, D] after the last norm
    heads              by name, output of each task head at the end of every example, fp32 [examples, outputs]
    router_statistics  of each expert layer
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    segments: Tensor | None = None
    hidden: Tensor | None = None
    heads: dict[str, Tensor] | None = None
    router_statistics: list[RouterStatistics] | None = None

    def by_example(self, count: int) -> tuple[Tensor, Tensor]:
        """Sum of losses, fp64, and number of trained positions, int64, of each of `count` examples: [count]."""
        assert self.losses is not None and self.segments is not None
        rows = self.segments - 1
        sums = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add_(0, rows, self.losses.double())
        return sums, torch.bincount(rows, minlength=count)


# FSDP has to see the tensors of an output.
register_dataclass(Output)

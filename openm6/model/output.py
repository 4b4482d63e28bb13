"""The result of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from openm6.model.experts import Load


@dataclass
class Output:
    """What a forward gives.

    loss      sum of the losses of all M trained positions, each by its example's weight (divide by the sum of those, or
              by that of all processes)
    losses    fp32 [M], the single losses, without gradient
    segments  int64 [M], to which example of the batch each belongs
    hidden    [B, T, D] after the last norm
    heads     by name what each head gives at the end of every example, fp32 [examples, outputs]
    loads     what each layer of experts saw
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    segments: Tensor | None = None
    hidden: Tensor | None = None
    heads: dict[str, Tensor] | None = None
    loads: list[Load] | None = None

    def by_example(self, count: int) -> tuple[Tensor, Tensor]:
        """Of a batch of `count` examples each one's sum of losses, fp64, and trained positions, int64: [count]."""
        assert self.losses is not None and self.segments is not None
        rows = self.segments - 1
        sums = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add_(0, rows, self.losses.double())
        return sums, torch.bincount(rows, minlength=count)


# FSDP has to see the tensors of an output.
register_dataclass(Output)

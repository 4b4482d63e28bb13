"""The result of a forward pass, and its loss: cross-entropy over the vocabulary without keeping the logits.

The logits of 4,096 positions and 150,000 tokens are 2.5 GB in fp32, and again as much for their gradient.
Here they live one chunk at a time: the forward pass already takes the gradient (the loss is a plain sum, so
its gradient is known then), and the backward pass only scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from openm6.model.experts import RouterStatistics

CHUNK = 1024


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


@dataclass(frozen=True, slots=True)
class Teacher:
    """The outputs of another network at the same positions (distillation, Hinton et al. 2015, arXiv 1503.02531).

    logits       of a slice of the positions, fp32 [m, V]
    weight       of the teacher's part of the loss; the labels' part has 1 - weight
    temperature  divides the logits of both; the loss is multiplied by its square
    """

    logits: Callable[[slice], Tensor]
    weight: float = 0.5
    temperature: float = 2.0


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        smoothing: float,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor]:
        # The gradients are taken here only when somebody will ask for them.
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        total = losses.new_zeros(())
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        cast = weight.to(hidden.dtype)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            logits = (hidden[part] @ cast.T).float()
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[part] = (norm - logits.gather(1, labels[part, None])).squeeze(1)
            objective = losses[part]
            if smoothing:
                objective = (1 - smoothing) * objective + smoothing * (norm.squeeze(1) - logits.mean(1))
            from_teacher = None
            if teacher is not None:
                divergence, from_teacher = _divergence(logits, teacher.logits(part), teacher.temperature)
                objective = (1 - teacher.weight) * objective + teacher.weight * divergence
            total += objective.sum() if weights is None else objective @ weights[part]
            if not (need_hidden or need_weight):
                continue
            gradient = logits.sub_(norm).exp_()
            if smoothing:
                gradient -= smoothing / gradient.shape[1]
            gradient.scatter_add_(1, labels[part, None], gradient.new_full((len(gradient), 1), smoothing - 1.0))
            if teacher is not None:
                assert from_teacher is not None
                gradient.mul_(1 - teacher.weight).add_(from_teacher, alpha=teacher.weight)
            if weights is not None:
                gradient *= weights[part, None]
            gradient = gradient.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = gradient @ cast
            if d_weight is not None:
                d_weight += gradient.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_sum.to(d_hidden.dtype),
            None if d_weight is None else d_weight * d_sum,
            None,
            None,
            None,
            None,
        )


def _divergence(logits: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(teacher || student) of each position, [m], and its gradient by the student's logits, [m, V]."""
    student = (logits / temperature).log_softmax(-1)
    teacher = (wanted / temperature).log_softmax(-1)
    probs = teacher.exp()
    divergence = (probs * (teacher - student)).sum(-1) * temperature**2
    return divergence, (student.exp_() - probs) * temperature


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over the M positions of -log softmax(hidden weight^T)[label], and the M single losses (no gradient).

    hidden [M, D], weight [V, D], labels int64 [M]; `weights`, fp32 [M]: of each position in the sum, 1 by default. With
    `smoothing` the sum is against targets of which that fraction is spread over all ids (Szegedy et al. 2016); with a
    `teacher`, part of the sum is the divergence from the teacher. The single losses are not affected. Both results
    fp32."""
    total, losses = _LinearCrossEntropy.apply(hidden, weight, labels, weights, smoothing, teacher)
    return total, losses

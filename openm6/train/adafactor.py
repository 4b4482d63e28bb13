"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): second moments kept by row and column only.

torch.optim.Adafactor does the same for whole tensors, but not for sharded ones: its means over a sharded dimension are
changed in place before they are summed over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from openm6.train.distributed import is_sharded, whole


class Adafactor(Optimizer):
    """Steps are relative to a parameter's root mean square: lr 1e-2 is usual, and at most 1/sqrt(step) is taken.

    The last two dimensions of a tensor are factored; beta2 at step t is 1 - t^-0.8; no first moment.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state, eps = self.state[parameter], torch.finfo(parameter.dtype).eps
        square = gradient.square()
        news = (
            {"row_var": _settled(square.mean(-1, keepdim=True)), "col_var": _settled(square.mean(-2, keepdim=True))}
            if gradient.ndim > 1
            else {"variance": square}
        )
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {name: torch.zeros_like(new) for name, new in news.items()}
        state["step"] += 1
        step = float(state["step"])
        for name, new in news.items():
            state[name].lerp_(new, step**-0.8)
        if gradient.ndim > 1:
            across = _settled(state["row_var"].mean(-2, keepdim=True)).clamp(min=eps)
            variance = (state["row_var"] / across) * state["col_var"]
        else:
            variance = state["variance"]
        update = gradient * variance.clamp(min=eps * eps).rsqrt()
        size = parameter.numel() ** 0.5
        scale = max(1e-3, _norm(parameter) / size) * min(rate, step**-0.5) / max(1.0, _norm(update) / size)
        parameter.mul_(1 - rate * decay)
        parameter.add_(update, alpha=-scale)


def _settled(tensor: Tensor) -> Tensor:
    """Sums that are still spread over the processes, summed."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial, Replicate

    done = [Replicate() if isinstance(p, Partial) else p for p in tensor.placements]
    return tensor.redistribute(placements=done)


def _norm(tensor: Tensor) -> float:
    return float(whole(tensor.norm()))

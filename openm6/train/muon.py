"""Muon: momentum whose steps are orthogonal matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon always multiplies in bf16, which a CPU without bf16 units only emulates, a hundred times slower, and
takes no convolution kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openm6.model.precision import fast_dtype
from openm6.train.distributed import local, shard_of, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of a x + b x^3 + c x^5: iterated, it moves singular values into 0.7 to 1.2 in few steps."""


class Muon(Optimizer):
    """For the matrices and convolution kernels inside a network; the rest belongs to AdamW.

    A kernel [out, in, kh, kw] counts as the matrix [out, in * kh * kw], experts [N, out, in] as N matrices. Steps are
    scaled by 0.2 sqrt(max(rows, columns)), so that their root mean square, about 0.2, is that of AdamW's, and its
    learning rates and weight decay carry over (Liu et al. 2025, arXiv 2502.16982, section 2.2).

    Sharded (DTensors): each process works on the experts that it holds, and on the whole of every other matrix.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.05
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)  # by rows and columns
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])  # Nesterov
                matrices = local(ahead) if ahead.ndim == 3 else whole(ahead).flatten(1)[None]
                alike[matrices.shape[1:], matrices.device].append((parameter, matrices))
            for (shape, _), pairs in alike.items():
                directions = orthogonal(torch.cat([matrices for _, matrices in pairs]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                sizes = [len(matrices) for _, matrices in pairs]
                for (parameter, _), direction in zip(pairs, directions.split(sizes), strict=True):
                    if parameter.ndim != 3:
                        direction = shard_of(direction.view(parameter.shape), parameter)
                    here = local(parameter)
                    here.mul_(1 - group["lr"] * group["weight_decay"])
                    here.add_(direction, alpha=-rate)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The matrices [N, rows, columns], their singular values brought near 1: U V^T, roughly, of U S V^T."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(fast_dtype(matrices.device.type))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)

"""Optimizers (AdamW, Muon, Adafactor) and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openm6.core.extras import require
from openm6.model.precision import fast_dtype
from openm6.model.roles import Role, role_of
from openm6.train.distributed import is_sharded, local, shard_of, whole
from openm6.train.recipe import PseudoSection, TrainSection

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of a x + b x^3 + c x^5: iterated, it moves singular values into 0.7 to 1.2 in few steps."""


def is_decayed(role: Role, dimensions: int) -> bool:
    """True for matrices and kernels; vectors, factors and rows that are looked up have no weight decay."""
    return dimensions >= 2 and role not in (Role.EMBEDDING, Role.PATCH_POSITION, Role.SCALE)


def is_inner_matrix(role: Role, dimensions: int) -> bool:
    """True for the parameters of Muon, matrices and kernels between embeddings and output. The rows of a router are
    choices, not a map between two spaces."""
    return is_decayed(role, dimensions) and role not in (Role.HEAD, Role.ROUTER)


def make_optimizers(model: nn.Module, settings: TrainSection) -> list[Optimizer]:
    """The recipe's optimizer for all parameters; with Muon, a Muon for the inner matrices and AdamW for the rest.

    The `peak_lr` of each group is its learning rate where `rate_at` is 1.
    """
    inner, outer, plain = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = role_of(model, name), parameter.ndim
            (inner if is_inner_matrix(*kind) else outer if is_decayed(*kind) else plain).append(parameter)
    muon = settings.optimizer == "muon"
    groups: list[dict[str, Any]] = [
        {"params": outer if muon else inner + outer, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers = [_optimizer(groups, settings)]
    if muon:
        rate = settings.matrix_learning_rate or settings.learning_rate
        optimizers.append(Muon(inner, lr=rate, weight_decay=settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = float(group["lr"])
    return optimizers


def step_all(optimizers: list[Optimizer]) -> None:
    """Step by the present gradients, and clear them."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group a learning rate, in whatever form its optimizer keeps it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _optimizer(groups: list[dict[str, Any]], settings: TrainSection) -> Optimizer:
    rate, betas = settings.learning_rate, settings.betas
    if settings.optimizer == "adafactor":
        return Adafactor(groups, lr=rate)
    if settings.optimizer == "adam8bit":
        require("lowbit", "torchao")
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(groups, lr=rate, betas=betas)
        if not torch.cuda.is_available():  # it compiles itself: minutes of a C++ compiler for a step of milliseconds
            optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
        return optimizer
    return AdamW(groups, lr=rate, betas=betas, fused=True)


def rate_at(step: int, settings: TrainSection, pseudo: PseudoSection | None = None) -> float:
    """The learning rate at a step (from 0) as a fraction of its peak: linear warm-up, then cosine, constant, or
    warm-up-stable-decay; with `pseudo`, warmed up again after delinking."""
    if pseudo and 0 <= step - pseudo.steps < pseudo.rewarm:
        return rate_at(step, settings) * (step - pseudo.steps + 1) / pseudo.rewarm
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        fraction = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:  # wsd: flat, then linear down over the last `decay` of all steps (MiniCPM, arXiv 2404.06395)
        span = max(1, round(settings.steps * settings.decay))
        fraction = min(1.0, (settings.steps - step) / span)
    return settings.final_rate + (1 - settings.final_rate) * fraction


class Uncompiled(Optimizer):
    """An optimizer that torch.compile never sees. PyTorch's guards against its compiler import it, which takes half as
    long as the import of PyTorch itself: the guarded methods are used without them. Step hooks, profiling and
    learning-rate schedulers are not affected: Optimizer adds its hooks when it is constructed."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)


class AdamW(Uncompiled, torch.optim.AdamW):
    """PyTorch's AdamW; its step cannot be differentiated (`differentiable`)."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Muon(Uncompiled):
    """Momentum whose steps are orthogonal matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for the
    matrices and convolution kernels inside a network; the rest belongs to AdamW. torch.optim.Muon always multiplies in
    bf16, which a CPU without bf16 units only emulates, a hundred times slower, and takes no convolution kernels.

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


class Adafactor(Uncompiled):
    """Second moments by row and column only (Shazeer and Stern 2018, arXiv 1804.04235). Steps are relative to a
    parameter's root mean square: lr 1e-2 is usual, and at most 1/sqrt(step) is taken.

    The last two dimensions of a tensor are factored; beta2 at step t is 1 - t^-0.8; no first moment.

    torch.optim.Adafactor does the same for whole tensors, but not for sharded ones: its means over a sharded dimension
    are changed in place before they are summed over the processes.
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

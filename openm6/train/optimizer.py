"""Optimizers and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openm6.core.extras import require
from openm6.model.roles import Role, role_of
from openm6.train.adafactor import Adafactor
from openm6.train.muon import Muon
from openm6.train.recipe import PseudoSection, TrainSection


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
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role, dimensions = role_of(model, name), parameter.ndim
            inside = is_inner_matrix(role, dimensions)
            (inner if inside else outer if is_decayed(role, dimensions) else plain).append(parameter)
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
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


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

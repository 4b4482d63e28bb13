"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from openm6.train.recipe import TrainSection


def make_optimizer(model: nn.Module, settings: TrainSection) -> Optimizer:
    """AdamW (fused). Weight decay falls on matrices and kernels, not on norms, biases and embeddings."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            small = parameter.ndim < 2 or "embed" in name or "place" in name or name.endswith((".row", ".column"))
            (plain if small else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def rate_at(step: int, settings: TrainSection) -> float:
    """The learning rate of a step (from 0): linear warm-up, then cosine, or constant, or warm-up-stable-decay."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:  # wsd: flat, then linear down over the last `decay` of all steps (MiniCPM, arXiv 2404.06395)
        span = max(1, round(settings.steps * settings.decay))
        share = min(1.0, (settings.steps - step) / span)
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * share)

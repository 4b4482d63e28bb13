"""Optimizers and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from openm6.train.muon import Muon
from openm6.train.recipe import TrainSection


def make_optimizers(model: nn.Module, settings: TrainSection) -> list[Optimizer]:
    """AdamW (fused) for all, or with Muon for the matrices and kernels between embeddings and output.

    Weight decay falls on matrices and kernels, not on norms, biases and embeddings. Each group's `peak_lr` is its
    learning rate where `rate_at` is 1.
    """
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or "embed" in name or "place" in name or name.endswith((".row", ".column")):
            plain.append(parameter)
        else:
            (outer if name.startswith("head.") else inner).append(parameter)
    muon = settings.optimizer == "muon"
    groups: list[dict[str, Any]] = [
        {"params": outer if muon else inner + outer, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    ]
    if muon:
        rate = settings.matrix_learning_rate or settings.learning_rate
        optimizers.append(Muon(inner, lr=rate, weight_decay=settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def rate_at(step: int, settings: TrainSection) -> float:
    """The share of its highest that the learning rate has at a step (from 0): linear warm-up, then cosine, or
    constant, or warm-up-stable-decay."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:  # wsd: flat, then linear down over the last `decay` of all steps (MiniCPM, arXiv 2404.06395)
        span = max(1, round(settings.steps * settings.decay))
        share = min(1.0, (settings.steps - step) / span)
    return settings.final_rate + (1 - settings.final_rate) * share

"""RMSNorm (modern block) or LayerNorm (the papers' block)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openm6.model import cpu
from openm6.model.cpu.norm import RMSNormKernel

if TYPE_CHECKING:
    from openm6.model.config import ModelConfig


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The normalization that the configuration names, over the last dimension of size `width`."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(width, eps=config.norm_eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), by `rms_norm`."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, whose CPU kernel wants weights in the precision of x; sharded ones are gathered in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, taken in fp32; `weight` is [D] or broadcasts to the last dimensions of x."""
    if cpu.takes(x):
        return RMSNormKernel.apply(x, weight, eps)
    return torch.rms_norm(x, x.shape[-1:], None, eps) * weight

"""RMSNorm (modern block) or LayerNorm (the papers' block)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    """RMSNorm over the last dimension, taken in fp32; `weight` is [D] or broadcasts to the last dimensions of x.

    PyTorch's has a fused kernel on GPUs only; on a CPU it makes six passes over memory forward and twice as many
    backward. Here they are three and seven.
    """
    if x.is_cuda:
        return torch.rms_norm(x, x.shape[-1:], None, eps) * weight
    return _RMSNorm.apply(x, weight, eps)


def length_of(x: Tensor, least: Tensor) -> Tensor:
    """sqrt(|x|^2 + least^2) over the last dimension, [..., 1], without a pass of its own for the squares.

    With `least` sqrt(D eps) it is sqrt(D) times what RMSNorm divides by. At least fp32, as `least` is.
    """
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=least.dtype), least)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        scale = width**0.5 / length_of(x, torch.tensor((width * eps) ** 0.5, dtype=dtype))
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        ctx.dtype = x.dtype
        return (unit * weight).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        d_out = d_out.to(unit.dtype)
        d_weight = (d_out * unit).sum_to_size(weight.shape).to(weight.dtype)
        d_unit = d_out * weight
        along = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1).div_(-unit.shape[-1])
        return torch.addcmul(d_unit, unit, along).mul_(scale).to(ctx.dtype), d_weight, None

"""RMSNorm with fewer passes over memory than PyTorch's on a CPU: three forward instead of six, seven backward instead
of twelve. On GPUs PyTorch has a fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def length_of(x: Tensor, least: Tensor) -> Tensor:
    """sqrt(|x|^2 + least^2) over the last dimension, [..., 1], without a pass of its own for the squares.

    With `least` sqrt(D eps) it is sqrt(D) times what RMSNorm divides by. At least fp32, as `least` is.
    """
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=least.dtype), least)


class RMSNormKernel(torch.autograd.Function):
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

"""Weights laid out once for the CPU's kernels instead of at every product, with the norms' weights in them.

At one position a layer is some thirty operations of microseconds each, so every one that can be done beforehand
counts: a norm's weight is multiplied into the matrix behind it, and so is the sqrt(D) of its mean square.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model.norm import RMSNorm, length_of
from openm6.model.precision import fast_dtype

ROWS = 16
"""The rows that weights are laid out for: 16 rows then take 0.6 of the time of a layout for one, one row as long."""


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def kernel_dtype() -> torch.dtype:
    """bf16 where this CPU runs it well and this PyTorch has oneDNN's kernels, else fp32."""
    return fast_dtype("cpu") if _has_onednn() else torch.float32


class PackedLinear(nn.Module):
    """x W^T + b, from [..., in] to [..., out] in `dtype` (bf16 or fp32). No gradients.

    In fp32 too, 16 rows take oneDNN half the time that they take `linear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.onednn = _has_onednn()
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Shrink(nn.Module):
    """x / sqrt(|x|^2 + D eps): an RMSNorm without its weight and without sqrt(D)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.least = torch.tensor((width * eps) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / length_of(x, self.least)


def fold(norm: nn.Module, linear: nn.Linear, dtype: torch.dtype) -> tuple[nn.Module, PackedLinear]:
    """A norm and the product behind it as a pair that gives the same with less to do (a LayerNorm stays: its kernel
    takes its weight along)."""
    if not isinstance(norm, RMSNorm):
        return norm, PackedLinear(linear.weight, linear.bias, dtype)
    width = norm.weight.shape[0]
    weight = linear.weight.float() * norm.weight.float() * width**0.5
    return Shrink(width, norm.eps), PackedLinear(weight, linear.bias, dtype)

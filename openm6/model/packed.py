"""Weights laid out once for the CPU's bf16 kernels (oneDNN) instead of at every product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm6.model.precision import fast_dtype


def available() -> bool:
    """Whether this PyTorch has the kernels and this CPU runs bf16 well."""
    return (
        torch.backends.mkldnn.is_available()
        and fast_dtype("cpu") == torch.bfloat16
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinear(nn.Module):
    """x W^T + b in bf16, from fp32 or bf16 [..., in] to bf16 [..., out]. No gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16().contiguous(), 1)
        self.bias = None if bias is None else bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], "")

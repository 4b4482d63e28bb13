"""Products with weights that are laid out once for the CPU's kernels instead of at every product."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.model import lowbit
from openm6.model.precision import fast_dtype

ROWS = 16
"""The rows that weights are laid out for: 16 rows then take 0.6 of the time of a layout for one, one row as long."""


LEAST_ROWS, FEW_INPUTS = 4, 1024
"""With fewer rows some kernels sum in another order than with many, which changes the last bit: `linear` in fp32, and
oneDNN for one row of more inputs than FEW_INPUTS."""


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def kernel_dtype() -> torch.dtype:
    """bf16 where this CPU runs it well and this PyTorch has oneDNN's kernels, else fp32."""
    return fast_dtype("cpu") if _has_onednn() else torch.float32


def with_least_rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) for x [..., in]; on a CPU with rows of zeros beside it where there are fewer than LEAST_ROWS, so that
    a row's result does not depend on their number."""
    rows = x.numel() // x.shape[-1]
    if rows >= LEAST_ROWS or not rows or x.is_cuda:
        return product(x)
    y = product(F.pad(x.reshape(rows, -1), (0, 0, 0, LEAST_ROWS - rows)))
    return y[:rows].view(*x.shape[:-1], -1)


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
        return self._product(x) if x.shape[-1] <= FEW_INPUTS else with_least_rows(self._product, x)

    def _product(self, x: Tensor) -> Tensor:
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class PackedInt8(nn.Module):
    """The same with weights in 8 bits, and each row of inputs rounded to 8 bits for the product; fp32 out. One row, and
    512 to 2,816: half the time of bf16, a third of fp32."""

    dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        numbers, scale = lowbit.round8(weight)
        with warnings.catch_warnings():  # PyTorch means to have such tensors in torchao alone one day
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            kept = torch._make_per_channel_quantized_tensor(numbers, scale.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(kept, None if bias is None else bias.detach().float())
        # Without VNNI sums of products of 8 bits overflow: inputs get 7 there.
        self.fewer = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x.float(), self.packed, self.fewer)
        return y


class PackedInt4(nn.Module):
    """The same with weights in 4 bits; bf16 out. It saves memory, and time for a row or two: 64 rows take 2.7 times as
    long as in bf16."""

    dtype = torch.bfloat16

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        numbers, self.scales = lowbit.round4(weight)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 2)
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.to(self.dtype).flatten(0, -2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, lowbit.GROUP, self.scales)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


Packed = PackedLinear | PackedInt8 | PackedInt4


def packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Packed:
    """A product by the kernel for `dtype`: bf16, fp32, int8 or, where the shape allows it, int4 (lowbit.py)."""
    if dtype == lowbit.INT4 and lowbit.fits4(weight.shape):
        return PackedInt4(weight, bias)
    if dtype in (lowbit.INT8, lowbit.INT4):
        return PackedInt8(weight, bias)
    return PackedLinear(weight, bias, dtype)

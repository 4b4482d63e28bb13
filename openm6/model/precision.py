"""Matrix products on this machine: their precision, and their peak rate."""

from __future__ import annotations

import os
import time
from functools import cache

import torch

from openm6.core.environment import DTYPE


@cache
def fast_dtype(device: str) -> torch.dtype:
    """bf16 where the device ("cpu", "cuda") has units for it, else fp32.

    A CPU that only emulates bf16 loses by it, far: 1 GFLOP/s against 150 in fp32 on two AVX2 cores, where two with
    AVX-512 BF16 reach 900. The environment variable OPENM6_DTYPE=float32 asks for fp32 everywhere.
    """
    if os.environ.get(DTYPE) == "float32":
        return torch.float32
    if device == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        arm = "aarch64" in torch.__config__.show() or not torch.cpu._is_avx2_supported()
        good = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (units or arm)
    return torch.bfloat16 if good else torch.float32


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision of matrix products with `x`: autocast's where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@cache
def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this machine, the best of a few runs: the peak of the utilization."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        c = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del c
    return 2 * size**3 / best

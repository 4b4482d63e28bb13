"""The CPU's plain attention against SDPA, forward and backward, on packed rows of short examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import race, with_gradients
from openm6.model.attention import attend
from openm6.model.masks import build_mask
from openm6.model.precision import fast_dtype

TITLE = "Attention on packed rows: plain products against SDPA (CPU, forward + backward)"
SHAPES = ((50, 4, 64, 32), (26, 4, 128, 40), (16, 8, 256, 60), (8, 8, 512, 512))
"""Rows, heads, positions of a row, positions of an example."""


def run(shapes: Iterable[tuple[int, int, int, int]] = SHAPES) -> tuple[list[dict[str, Any]], str]:
    dtype = fast_dtype("cpu")
    rows = []
    for batch, heads, length, example in shapes:
        segments = (torch.arange(length) // example + 1).expand(batch, -1).contiguous()
        blocks = torch.full_like(segments, -1)
        mask = build_mask(segments, blocks, dtype, flex=False)
        qkv = [torch.randn(batch, length, heads, 64, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
        forward = {
            "plain": lambda qkv=qkv, mask=mask: attend(*qkv, mask),
            "SDPA": lambda qkv=qkv, mask=mask: F.scaled_dot_product_attention(*qkv, attn_mask=mask.bias),
        }
        timings = race({name: with_gradients(run, qkv) for name, run in forward.items()})
        rows += [
            {
                "precision": str(dtype).removeprefix("torch."), "rows": batch, "heads": heads, "positions": length,
                "an example": example, "side": name,
                "ms": t.median * 1e3, "spread": f"{t.low * 1e3:.1f} to {t.high * 1e3:.1f}",
                "plain is faster by": round(t.median / timings["plain"].median, 2),
            }
            for name, t in timings.items()
        ]  # fmt: skip
    return rows, "Median of 9, sides in turn; the last shape is one causal example a row."

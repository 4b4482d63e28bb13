"""Block-sparse attention of a long picture against dense SDPA: 4,096 codes that see 64 positions of text and, under the
pattern of model/sparse.py, each other; one layer's attention, without its projections.

On a CPU compiled FlexAttention and gathered blocks forward, gathered blocks forward and backward (4 heads of width 32,
fp32; 8 of width 64, bf16). On a GPU compiled FlexAttention forward and backward (16 heads of width 64, bf16), tiles of
32, 64 and 128 codes.
`python -m benchmarks.sparse_attention --device cpu` leaves the GPU alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import race, report, with_gradients
from openm6.model.sparse import SparsePattern, block_mask, flex_attend, sparse_attend

TITLE = "Block-sparse attention of a long picture against dense SDPA"
SIDE, TEXT = 64, 64


def run(device: str | None = None, side: int = SIDE) -> tuple[list[dict[str, Any]], str]:
    """On `device`, "cpu" or "cuda"; by default a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = _gpu(side) if device == "cuda" else _cpu(side)
    note = (
        f"{side**2:,} codes that see {TEXT} positions of text and each other both ways; median of 9 runs in turn, "
        "spread = quartiles. Dense SDPA has the same queries and keys without a mask. Kept: pairs of tiles that are "
        "looked at, of all; promised: pairs of positions, dense ones to kept ones, text included. All sides take "
        "queries, keys and values row by row: bringing them into tiles and back is timed too; making a mask and "
        "compiling are not."
    )
    return rows, note


def _cpu(side: int) -> list[dict[str, Any]]:
    pattern = SparsePattern(side)
    mask, rows = block_mask(pattern, TEXT), []
    for heads, width, dtype, precision in ((4, 32, torch.float32, "fp32"), (8, 64, torch.bfloat16, "bf16")):
        inputs, dense_inputs = _inputs("cpu", side, 1, heads, width, dtype)
        plain, dense = ([t.detach() for t in some] for some in (inputs, dense_inputs))
        forward = {
            "FlexAttention": lambda plain=plain: flex_attend(*plain, pattern, mask),
            "gathered blocks": lambda plain=plain: sparse_attend(*plain, pattern),
            "dense SDPA": lambda dense=dense: F.scaled_dot_product_attention(*dense),
        }
        both = {
            "gathered blocks": with_gradients(lambda inputs=inputs: sparse_attend(*inputs, pattern), inputs),
            "dense SDPA": with_gradients(lambda some=dense_inputs: F.scaled_dot_product_attention(*some), dense_inputs),
        }
        rows += _rows("forward", precision, inputs, forward, pattern)
        rows += _rows("forward + backward", precision, inputs, both, pattern)
    return rows


def _gpu(side: int) -> list[dict[str, Any]]:
    inputs, dense_inputs = _inputs("cuda", side, rows=4, heads=16, width=64, dtype=torch.bfloat16)
    rows = []
    for tile in ((4, 8), (8, 8), (8, 16)):
        pattern = SparsePattern(side, tile)
        mask = block_mask(pattern, TEXT, device="cuda")
        sides = {
            "FlexAttention": with_gradients(lambda p=pattern, m=mask: flex_attend(*inputs, p, m), inputs),
            "dense SDPA": with_gradients(lambda: F.scaled_dot_product_attention(*dense_inputs), dense_inputs),
        }
        rows += _rows("forward + backward", "bf16", inputs, sides, pattern)
    return rows


def _inputs(
    device: str, side: int, rows: int, heads: int, width: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values of the codes, keys and values of the text; the same with text and codes in one."""
    torch.manual_seed(0)
    lengths = (side**2, side**2, side**2, TEXT, TEXT)
    q, k, v, k_text, v_text = (torch.randn(rows, heads, n, width, device=device, dtype=dtype) for n in lengths)
    sparse, dense = (q, k, v, k_text, v_text), (q, torch.cat((k_text, k), 2), torch.cat((v_text, v), 2))
    return [t.clone().requires_grad_() for t in sparse], [t.clone().requires_grad_() for t in dense]


def _rows(
    what: str, precision: str, inputs: list[Tensor], sides: dict[str, Callable[[], object]], pattern: SparsePattern
) -> list[dict[str, Any]]:
    timings = race(sides)
    dense = timings["dense SDPA"]
    rows, heads, _, width = inputs[0].shape
    promised = (pattern.codes + TEXT) / (pattern.codes * pattern.kept_share + TEXT)
    return [
        {
            "what": what, "rows": rows, "heads x width": f"{heads} x {width}", "precision": precision,
            "tile": f"{pattern.tile[0]} x {pattern.tile[1]}", "side": name,
            "ms": round(1e3 * t.median, 2), "spread": f"{1e3 * t.low:.2f} to {1e3 * t.high:.2f}",
            "faster by": round(dense.median / t.median, 2),
            "from, to": f"{dense.low / t.high:.2f} to {dense.high / t.low:.2f}",
            "kept": 1.0 if t is dense else round(pattern.kept_share, 3),
            "promised": 1.0 if t is dense else round(promised, 2),
        }
        for name, t in timings.items()
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_attention", description=TITLE)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    found, remark = run(arguments.device)
    print(report("sparse_attention", TITLE, found, remark, arguments.out))

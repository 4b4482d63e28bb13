"""The experts' products on a CPU, one expert after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.model.feed_forward import activate

ROUND = 16
"""On a CPU the number of an expert's rows is rounded up to a multiple of this."""


class ExpertLoop(torch.autograd.Function):
    """One expert after the other. On a CPU its three matrices and its rows stay in the cache, each product runs at full
    speed, and only the inner activations before the gate are kept for the backward pass.

    oneDNN prepares a product for each number of rows that it has not met, which takes longer than a small product does.
    So an expert works on its rows rounded up to ROUND: those of the next one beyond its own are overwritten when that
    one's turn comes, and have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, up: Tensor, down: Tensor, counts: list[int], gated: bool) -> Tensor:
        dtype = rows_SD.dtype
        out_SD, inner = torch.empty_like(rows_SD), rows_SD.new_empty(len(rows_SD), up.shape[1])
        end = 0
        for n, count in enumerate(counts):
            part, end = _rounded(end, count, len(rows_SD)), end + count
            torch.mm(rows_SD[part], up[n].to(dtype).T, out=inner[part])
            torch.mm(activate(inner[part], gated), down[n].to(dtype).T, out=out_SD[part])
        out_SD[end:] = 0
        ctx.save_for_backward(rows_SD, up, down, inner)
        ctx.counts, ctx.gated = counts, gated
        return out_SD

    @staticmethod
    def backward(ctx: Any, d_out_SD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows_SD, up, down, inner = ctx.saved_tensors
        dtype = rows_SD.dtype
        d_rows_SD, d_up, d_down = torch.empty_like(rows_SD), torch.empty_like(up), torch.empty_like(down)
        end = 0
        for n, count in enumerate(ctx.counts):
            part, end = _rounded(end, count, len(rows_SD)), end + count
            d_out = d_out_SD[part].clone()
            d_out[count:] = 0
            d_hidden = torch.mm(d_out, down[n].to(dtype))
            hidden, d_inner = _activate_backward(inner[part], d_hidden, ctx.gated)
            _product_into(d_down[n], d_out.T, hidden)
            _product_into(d_up[n], d_inner.T, rows_SD[part])
            torch.mm(d_inner, up[n].to(dtype), out=d_rows_SD[part])
        d_rows_SD[end:] = 0
        return d_rows_SD, d_up, d_down, None, None


def _rounded(start: int, count: int, rows: int) -> slice:
    """`count` rows from `start`, and as many of those behind them as make it a multiple of ROUND (none of none)."""
    return slice(start, min(start + -(-count // ROUND) * ROUND, rows))


def _product_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """a b, written to where it belongs, also where that is wider."""
    if target.dtype == a.dtype:
        torch.mm(a, b, out=target)
    else:
        target.copy_(a @ b)


def _activate_backward(x: Tensor, d_out: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """activate(x) once more, and the gradient of x."""
    if not gated:
        return F.gelu(x), torch.ops.aten.gelu_backward(d_out, x)
    gate, up = x.chunk(2, dim=-1)
    soft = F.silu(gate)
    d_x = torch.empty_like(x)
    d_gate, d_up = d_x.chunk(2, dim=-1)
    torch.mul(d_out, soft, out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(d_out * up, gate))
    return soft * up, d_x

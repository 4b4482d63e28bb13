"""One layer of experts, forward and backward, routing and dispatch included: against a dense feed-forward of equal
activated FLOPs, transformers' Mixtral and Qwen3-MoE blocks (their fastest implementation here) and a plain loop; the
routers alone; and the cost of more experts at constant tokens.

All sides have weights and inputs in one precision (bf16 where the machine has units for it) and take the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import race
from openm6.model import ModelConfig
from openm6.model.experts import MixtureOfExperts
from openm6.model.feed_forward import FeedForward
from openm6.model.precision import fast_dtype, peak_flops

TITLE = "A layer of experts, forward and backward"
IMPLEMENTATIONS = ("eager", "grouped_mm")
MOST = 2**29
"""Experts times hidden size squared: with gradients 18 GB in bf16, for all the sides are held at once."""


def run(hidden_sizes: tuple[int, ...] = (), tokens: int = 0) -> tuple[list[dict[str, Any]], str]:
    """`hidden_sizes` and `tokens` default to those for this kind of machine."""
    cuda = torch.cuda.is_available()
    hidden_sizes = hidden_sizes or ((1024, 2048, 4096) if cuda else (512,))
    tokens = tokens or (32768 if cuda else 8192)
    peak = peak_flops(*_place())
    rows: list[dict[str, Any]] = []
    for hidden in hidden_sizes:
        for chosen in (1, 2):
            rows += _against_peers(hidden, tokens, chosen)
        rows += _routers(hidden, tokens)
        rows += _more_experts(hidden, tokens)
    note = (
        f"{tokens:,} tokens, SwiGLU; the experts of a token together are as wide as the dense feed-forward "
        "(hidden x 11/4); median of 9 runs in turn, spread = quartiles. Loads as an untrained router makes them. "
        f"Peak: the best square product just before, {peak / 1e12:,.2f} TFLOP/s; only the products of experts count."
    )
    return rows, note


def _against_peers(hidden: int, tokens: int, chosen: int, experts: int = 16) -> list[dict[str, Any]]:
    width = hidden * 11 // 4
    x = _input(hidden, tokens)
    sides = {
        f"OpenM6 {router}": _step(_ours(hidden, experts, chosen, width // chosen, router), x)
        for router in ("topk", "prototype", "grouped")
    }
    sides["dense of equal FLOPs"] = _step(_dense(hidden, width), x)
    for implementation in IMPLEMENTATIONS:
        for family in ("Qwen3-MoE", "Mixtral"):
            peer = _theirs(hidden, experts, chosen, width // chosen, implementation, family)
            sides[f"transformers {family}, {implementation}"] = _step(peer, x)
    sides["plain loop"] = _step(_PlainLoop(_ours(hidden, experts, chosen, width // chosen, "topk")), x)
    return _rows(sides, "dense of equal FLOPs", f"layer, top {chosen} of {experts}", hidden, tokens)


def _routers(hidden: int, tokens: int, experts: int = 64) -> list[dict[str, Any]]:
    x = _input(hidden, tokens).detach()[0]
    rows = []
    for chosen in (2, 4):
        sides = {}
        for router in ("topk", "prototype", "grouped"):
            layer = _ours(hidden, experts, chosen, 64, router)

            def routing(layer: MixtureOfExperts = layer) -> None:
                layer.router(x).weights_TK.sum().backward()

            sides[f"OpenM6 {router}"] = routing
        rows += _rows(sides, "OpenM6 topk", f"router, {chosen} of {experts}", hidden)
    return rows


def _more_experts(hidden: int, tokens: int) -> list[dict[str, Any]]:
    x = _input(hidden, tokens)
    width = hidden * 11 // 4
    sides = {
        f"OpenM6, {experts} experts": _step(_ours(hidden, experts, 1, width, "topk"), x)
        for experts in (8, 16, 32, 64, 128, 256)
        if experts * hidden**2 <= MOST
    }
    sides["dense of equal FLOPs"] = _step(_dense(hidden, width), x)
    return _rows(sides, "dense of equal FLOPs", "more experts, top 1", hidden, tokens)


def _rows(
    sides: dict[str, Callable[[], object]], base: str, what: str, hidden: int, tokens: int = 0
) -> list[dict[str, Any]]:
    """`tokens` that went through products: 0 for routers, whose share of the peak means nothing."""
    timings = race(sides)
    flops = 6 * tokens * 3 * hidden * (hidden * 11 // 4)
    return [
        {"what": what, "hidden": hidden, "side": name, "ms": round(1e3 * t.median, 2),
         "spread": f"{1e3 * t.low:.2f} to {1e3 * t.high:.2f}", "time / base": round(t.median / timings[base].median, 2),
         "base": base, "share of matmul peak": round(flops / t.median / peak_flops(*_place()), 3) if tokens else ""}
        for name, t in timings.items()
    ]  # fmt: skip


def _place() -> tuple[str, torch.dtype]:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return kind, fast_dtype(kind)


def _input(hidden: int, tokens: int) -> Tensor:
    kind, dtype = _place()
    torch.manual_seed(0)
    return torch.randn(1, tokens, hidden, device=kind).to(dtype).requires_grad_()


def _ready(module: nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    module = module.to(*_place())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def _ours(hidden: int, experts: int, chosen: int, width: int, router: str) -> MixtureOfExperts:
    config = ModelConfig(
        hidden_size=hidden, num_attention_heads=8, num_experts=experts, experts_per_token=chosen,
        expert_intermediate_size=width, router=router,
    )  # fmt: skip
    return _ready(MixtureOfExperts(config))


def _dense(hidden: int, width: int) -> FeedForward:
    return _ready(FeedForward(ModelConfig(hidden_size=hidden, num_attention_heads=8, intermediate_size=width)))


def _theirs(hidden: int, experts: int, chosen: int, width: int, implementation: str, family: str) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_experts_per_tok": chosen}
    block: type[nn.Module] = MixtralSparseMoeBlock if family == "Mixtral" else Qwen3MoeSparseMoeBlock
    config = (
        MixtralConfig(**sizes, intermediate_size=width, num_local_experts=experts)
        if family == "Mixtral"
        else Qwen3MoeConfig(**sizes, moe_intermediate_size=width, num_experts=experts)
    )
    config._experts_implementation = implementation
    return _ready(block(config))


class _PlainLoop(nn.Module):
    """The definition, expert by expert, by autograd."""

    def __init__(self, layer: MixtureOfExperts):
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD[0]
        routing = self.layer.router(x)
        out = torch.zeros_like(x)
        for n in range(self.layer.number):
            token, place = (routing.experts_TK == n).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.layer.experts.up[n]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.layer.experts.down[n])
            out = out.index_add(0, token, y * routing.weights_TK[token, place, None].to(y.dtype))
        return out[None]


def _step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def step() -> None:
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        x.grad = None
        module.zero_grad()

    return step

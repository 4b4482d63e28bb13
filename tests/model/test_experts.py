"""Experts against a naive loop over tokens in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from openm6.model import ModelConfig
from openm6.model.experts import MixtureOfExperts

CONFIG: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64,
    "image_embedder": "none",
}  # fmt: skip


def make(experts: int = 8, **values: Any) -> MixtureOfExperts:
    torch.manual_seed(values.pop("seed", 0))
    module = MixtureOfExperts(ModelConfig(**CONFIG, num_experts=experts, **values)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
        if module.router.bias is not None:
            module.router.bias.normal_(std=0.2)
    return module


def naive(module: MixtureOfExperts, x_TD: Tensor, kind: str, chosen: int, real: list[bool], capacity: float) -> Tensor:
    """Token by token, expert by expert, from the definitions."""
    experts, gated = module.number, module.experts.gated
    size = experts // chosen
    picks: list[list[tuple[int, Tensor]]] = []
    for t, x in enumerate(x_TD):
        if not real[t]:
            picks.append([])
            continue
        logits = [module.router.weight[n] @ x for n in range(experts)]
        groups = [range(g * size, (g + 1) * size) for g in range(chosen)]
        spans = groups if kind == "prototype" else [range(experts)]
        scores: dict[int, Tensor] = {}
        for span in spans:
            total = sum(logits[n].exp() for n in span)
            scores |= {n: logits[n].exp() / total for n in span}
        bias = module.router.bias
        wanted = {n: float(s.detach()) + (0.0 if bias is None else float(bias[n])) for n, s in scores.items()}
        if kind == "topk":
            best = sorted(wanted, key=lambda n: -wanted[n])[:chosen]
        else:
            best = [max(group, key=lambda n: wanted[n]) for group in groups]
        picks.append([(n, scores[n]) for n in best])
    taken = dict.fromkeys(range(experts), 0)
    out = torch.zeros_like(x_TD)
    for j in range(chosen):
        for t, x in enumerate(x_TD):
            if not picks[t]:
                continue
            n, weight = picks[t][j]
            taken[n] += 1
            if taken[n] > capacity:
                continue
            if module.router.normalize:
                weight = weight / sum(w for _, w in picks[t])
            inner = module.experts.up[n] @ x
            half = len(inner) // 2
            hidden = F.silu(inner[:half]) * inner[half:] if gated else F.gelu(inner)
            out[t] = out[t] + weight * (module.experts.down[n] @ hidden)
    return out


KINDS = [("topk", 1), ("topk", 3), ("prototype", 1), ("prototype", 4), ("grouped", 2)]


@pytest.mark.parametrize(("kind", "chosen"), KINDS)
@pytest.mark.parametrize("block", [{}, {"norm": "layer", "activation": "gelu", "positions": "learned"}])
@pytest.mark.parametrize("more", [{}, {"normalize_expert_weights": True, "bias_update": 1e-3}])
def test_outputs_and_gradients_equal_a_naive_loop(
    kind: str, chosen: int, block: dict[str, Any], more: dict[str, Any]
) -> None:
    module = make(router=kind, experts_per_token=chosen, **block, **more)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 7:] = False
    weights = [*module.parameters(), x]
    probe = torch.randn(18, 16, dtype=torch.float64)

    expected = naive(module, x.flatten(0, 1), kind, chosen, real.flatten().tolist(), math.inf)
    wanted = torch.autograd.grad((expected * probe).sum(), weights)
    found, load = module(x, real)
    got = torch.autograd.grad((found.flatten(0, 1) * probe).sum(), weights)

    torch.testing.assert_close(found.flatten(0, 1), expected)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert int(load.tokens_per_expert.sum()) == chosen * 16
    assert int(load.dropped) == 0


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["topk", "prototype", "grouped"]),
    chosen=st.sampled_from([1, 2, 4]),
    factor=st.floats(0.25, 2.0),
    tokens=st.integers(1, 24),
    seed=st.integers(0, 1000),
)
def test_capacity_drops_what_the_definition_drops(
    kind: str, chosen: int, factor: float, tokens: int, seed: int
) -> None:
    module = make(router=kind, experts_per_token=chosen, capacity_factor=factor, seed=seed)
    x = torch.randn(tokens, 16, dtype=torch.float64)
    capacity = math.ceil(factor * chosen * tokens / 8)
    found, load = module(x[None])
    expected = naive(module, x, kind, chosen, [True] * tokens, capacity)
    kept = (load.tokens_per_expert.clamp(max=capacity)).sum()
    assert int(load.dropped) == int(load.tokens_per_expert.sum() - kept)
    torch.testing.assert_close(found[0], expected)
    module.eval()
    assert int(module(x[None])[1].dropped) == 0


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["topk", "prototype", "grouped"]),
    factor=st.floats(0.25, 2.0),
    tokens=st.integers(1, 24),
    padding=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_padding_takes_no_place_and_gives_none(kind: str, factor: float, tokens: int, padding: int, seed: int) -> None:
    module = make(router=kind, experts_per_token=2, capacity_factor=factor, seed=seed)
    x = torch.randn(tokens, 16, dtype=torch.float64)
    places = torch.randperm(tokens + padding)[:tokens].sort().values
    real = torch.zeros(tokens + padding, dtype=torch.bool)
    real[places] = True
    padded = torch.randn(tokens + padding, 16, dtype=torch.float64)
    padded[places] = x
    alone, load = module(x[None])
    found, other = module(padded[None], real[None])
    torch.testing.assert_close(found[0, places], alone[0])
    assert other.tokens_per_expert.tolist() == load.tokens_per_expert.tolist() and int(other.dropped) == int(
        load.dropped
    )

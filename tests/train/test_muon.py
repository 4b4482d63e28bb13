"""Muon against singular value decompositions and against PyTorch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from openm6.model import M6, ModelConfig
from openm6.model.adapters import adapter_config, add_adapter
from openm6.model.changed import Prompt
from openm6.model.precision import fast_dtype
from openm6.train.optimizer import Muon, make_optimizers, orthogonal
from openm6.train.recipe import TrainSection

ROUNDING = 0.05 if fast_dtype("cpu") == torch.bfloat16 else 1e-4


@given(st.integers(1, 3), st.integers(2, 48), st.integers(2, 48), st.integers(0, 9))
def test_singular_values_come_near_one(count: int, rows: int, columns: int, seed: int) -> None:
    rank = min(rows, columns)
    values = torch.linspace(0.05, 1, rank, dtype=torch.float64)
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(count, n, rank, dtype=torch.float64))[0] for n in (rows, columns))
    made = orthogonal((u * values @ v.mT).float()).double()
    after = u.mT @ made @ v  # diagonal: the singular vectors stay
    diagonal = after.diagonal(dim1=-2, dim2=-1)
    assert float(diagonal.min()) > 0.5
    assert float(diagonal.max()) < 1.25
    assert float((after - torch.diag_embed(diagonal)).abs().max()) < max(ROUNDING, 1e-3)


def test_steps_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    start = [torch.randn(24, 10), torch.randn(24, 10), torch.randn(7, 30)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    pair = Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b, t in zip(ours, theirs, start, strict=True):
        # theirs rounds to bf16
        assert float((a - b).detach().norm() / (a.detach() - t).norm()) < 0.03


def test_each_expert_is_a_matrix() -> None:
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(5, 8, 12))
    single = [nn.Parameter(matrix.clone()) for matrix in experts.detach()]
    experts.grad = torch.randn(5, 8, 12)
    for matrix, gradient in zip(single, experts.grad, strict=True):
        matrix.grad = gradient.clone()
    Muon([experts, *single]).step()
    torch.testing.assert_close(experts.detach(), torch.stack(single).detach())


def test_a_kernel_is_a_matrix() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(8, 4, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix]).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not for a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_every_parameter_has_one_optimizer_and_embeddings_have_adamw() -> None:
    sizes = {"num_experts": 2, "heads": {"depth": 3}, "positions": "learned"}
    model = M6(ModelConfig.preset("demo", tie_word_embeddings=False, **sizes))
    model.prompt = Prompt(1, 4, model.config.hidden_size)
    settings = TrainSection(steps=1, optimizer="muon", learning_rate=1e-3, matrix_learning_rate=4e-3)
    adamw, muon = make_optimizers(model, settings)
    parts = [[id(p) for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert sorted(parts[0] + parts[1]) == sorted(map(id, model.parameters()))
    names = {name for name, p in model.named_parameters() if id(p) in set(parts[1])}
    assert "blocks.0.attention.qkv.weight" in names
    assert "image.features.0.weight" in names
    assert "blocks.0.feed_forward.experts.up" in names
    assert not names & {
        "embed.weight", "place.weight", "prompt.weight", "head.weight", "heads.depth.weight", "image.row",
        "norm.weight", "blocks.0.feed_forward.router.weight",
    }  # fmt: skip
    assert [{group["peak_lr"] for group in o.param_groups} for o in (adamw, muon)] == [{1e-3}, {4e-3}]


def test_weight_decay_draws_no_factor_and_no_prompt_to_zero() -> None:
    model = M6(ModelConfig.preset("demo"))
    model.prompt = Prompt(1, 4, model.config.hidden_size)
    add_adapter(model, adapter_config(Path("base"), "ia3"))
    model.prompt.requires_grad_(True)
    (adamw,) = make_optimizers(model, TrainSection(steps=1, weight_decay=0.1))
    decay = {p: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    found = {name: decay[p] for name, p in model.named_parameters() if p.requires_grad}
    assert any(".ia3_l" in name for name in found) and "prompt.weight" in found
    assert set(found.values()) == {0.0}

"""Parts without effect are pruned first, which changes nothing; the result is a network like any other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from openm6.core.batch import Batch, pack
from openm6.core.errors import UsageError
from openm6.model import M6, ModelConfig
from openm6.model.count import count_parameters
from openm6.weights.prune import prune
from tests.conftest import EXPERTS, example, tiny_model


@pytest.fixture
def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    return [pack([example(rng, 4, 6, ((2, 2),)), example(rng, 3, 9)], 32, 0) for _ in range(3)]


def same(model: M6, pruned: M6, batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            real = batch.segments > 0
            found, expected = (one(batch).hidden[real] for one in (pruned, model))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def silence(weight: torch.Tensor, *places: object) -> None:
    with torch.no_grad():
        weight[places] = 0.0


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "norm": "layer"}, {"qk_norm": True}])
def test_units_without_effect_go_first(changes: dict[str, str], batches: list[Batch]) -> None:
    model, silent = tiny_model(**changes), torch.arange(0, 48, 3)
    for block in model.blocks:
        silence(block.feed_forward.down.weight, slice(None), silent)
    pruned = prune(model, batches, width=32)
    assert pruned.config.intermediate_size == 32
    same(model, pruned, batches)
    assert sum(p.numel() for p in pruned.parameters()) == sum(count_parameters(pruned.config).values())


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_heads_without_effect_go_first(shared: int, norm: str, batches: list[Batch]) -> None:
    model = tiny_model(num_key_value_heads=4 // shared, norm=norm, qk_norm=True)
    for block, group in zip(model.blocks, (0, 1), strict=True):
        silence(block.attention.out.weight, slice(None), slice(group * 8 * shared, (group + 1) * 8 * shared))
    pruned = prune(model, batches, key_value_heads=4 // shared - 1)
    assert pruned.config.num_attention_heads == 4 - shared and pruned.config.head_dim == 8
    same(model, pruned, batches)


def test_a_layer_without_effect_goes_first(batches: list[Batch]) -> None:
    model = tiny_model(num_hidden_layers=4)
    for weight in (model.blocks[2].attention.out.weight, model.blocks[2].feed_forward.down.weight):
        silence(weight)
    pruned = prune(model, batches, layers=3)
    assert pruned.config.num_hidden_layers == 3
    same(model, pruned, batches)
    assert len(model.blocks) == 4  # the one before is as it was


@pytest.mark.parametrize("router", ["topk", "prototype", "grouped"])
def test_experts_that_nobody_chooses_go_first(router: str, batches: list[Batch]) -> None:
    model = tiny_model(**{**EXPERTS, "router": router, "num_experts": 8, "bias_update": 0.01})
    for block, silent in zip(model.blocks, ([1, 6], [0, 5]), strict=True):
        silence(block.feed_forward.experts.down, silent)
    pruned = prune(model, batches, experts=6)
    assert pruned.config.num_experts == 6 and pruned.config.expert_intermediate_size == 48
    for block, kept in zip(pruned.blocks, ([0, 2, 3, 4, 5, 7], [1, 2, 3, 4, 6, 7]), strict=True):
        before = model.blocks[0 if kept[0] == 0 else 1].feed_forward
        assert torch.equal(block.feed_forward.experts.up, before.experts.up[kept])
        assert torch.equal(block.feed_forward.router.weight, before.router.weight[kept])
    assert torch.isfinite(pruned(batches[0]).loss)


def test_layers_of_experts_stay_in_their_order(batches: list[Batch]) -> None:
    """Layers left of dense, experts, dense, experts are described by interval and first dense layers."""
    model = tiny_model(num_hidden_layers=4, expert_interval=2, **EXPERTS)
    pruned = prune(model, batches, layers=2, width=40, experts=2)
    assert pruned.config.num_hidden_layers == 2 and pruned.config.expert_layers()
    assert pruned(batches[0]).hidden.isfinite().all()


def test_what_is_left_out_is_worth_less_than_what_is_kept(batches: list[Batch]) -> None:
    """In a trained network, the chosen units have a lower loss than as many others."""
    torch.manual_seed(0)
    model = M6(tiny_model().config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(model(batch).loss for batch in batches).backward()
        optimizer.step()

    def loss(one: M6) -> float:
        with torch.no_grad():
            return float(sum(one(batch).loss for batch in batches))

    best = loss(prune(model, batches, width=24))
    others = []
    for seed in range(5):
        torch.manual_seed(seed)
        other = M6(ModelConfig(**{**model.config.to_dict(), "intermediate_size": 24, "expert_intermediate_size": 24}))
        weights = dict(model.state_dict())
        for number in range(2):
            place, kept = f"blocks.{number}.feed_forward", torch.randperm(48)[:24]
            weights[f"{place}.up.weight"] = weights[f"{place}.up.weight"][torch.cat((kept, kept + 48))]
            weights[f"{place}.down.weight"] = weights[f"{place}.down.weight"][:, kept]
        other.load_state_dict(weights)
        others.append(loss(other))
    assert loss(model) <= best < min(others)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda b: prune(tiny_model(), b, layers=3), "layers is 3; the model has 2"),
        (lambda b: prune(tiny_model(), b, experts=1), "experts is 1; the model has 0"),
        (lambda b: prune(tiny_model(**EXPERTS), b, experts=3), "multiple of 2"),
        (lambda b: prune(tiny_model(**EXPERTS), b, width=8), "experts in all layers"),
        (lambda b: prune(tiny_model(distinct_layers=1), b, layers=1), "share weights"),
    ],
)
def test_what_cannot_be_is_told(given: Callable[[list[Batch]], M6], told: str, batches: list[Batch]) -> None:
    with pytest.raises(UsageError, match=told):
        given(batches)

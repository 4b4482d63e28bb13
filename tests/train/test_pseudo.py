"""Pseudo-to-Real: shared layers, parted in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openm6.core.batch import pack
from openm6.core.errors import UsageError
from openm6.inference.session import Session
from openm6.model import M6, ModelConfig
from openm6.model.count import count_parameters
from openm6.train.checkpoint import Checkpoints
from openm6.train.distributed import Group
from openm6.train.optimizer import make_optimizers, rate_at
from openm6.train.recipe import PseudoSection, Recipe, TrainSection
from openm6.train.trainer import train
from tests.conftest import EXPERTS, example, tiny_config, tiny_model
from tests.train.conftest import SIZES, PowerCutError, cut_at, losses, tiny_recipe

ALONE = Group(0, 1, torch.device("cpu"))


def two_stages(output: Path, sizes: dict[str, Any] | None = None, **pseudo: Any) -> Recipe:
    recipe = tiny_recipe(output, model={"preset": "demo", "sizes": {**SIZES, "num_hidden_layers": 4, **(sizes or {})}})
    return recipe.model_copy(update={"pseudo": PseudoSection(**{"steps": 4, "rewarm": 0, **pseudo})})


@pytest.mark.parametrize("changes", [{}, EXPERTS, {"norm": "layer", "activation": "gelu", "positions": "learned"}])
@pytest.mark.parametrize("distinct", [1, 2])
def test_shared_layers_compute_what_equal_layers_do(changes: dict[str, Any], distinct: int) -> None:
    shared = tiny_model(num_hidden_layers=4, distinct_layers=distinct, **changes)
    whole = M6(tiny_config(num_hidden_layers=4, **changes)).eval()
    weights = shared.state_dict()
    whole.load_state_dict({n: weights[_shared_name(n, distinct)] for n in whole.state_dict()})
    batch = pack([example(np.random.default_rng(0), 4, 6), example(np.random.default_rng(1), 2, 9)], 32, 0)
    with torch.no_grad():
        assert torch.equal(shared(batch).hidden, whole(batch).hidden)


def _shared_name(name: str, distinct: int) -> str:
    parts = name.split(".")
    return ".".join(["blocks", str(int(parts[1]) % distinct), *parts[2:]]) if parts[0] == "blocks" else name


def test_sharing_saves_what_it_promises() -> None:
    whole = ModelConfig.preset("m6-10t")
    shared = ModelConfig.preset("m6-10t", distinct_layers=1)
    a, b = count_parameters(whole), count_parameters(shared)
    assert all(b[part] * 48 == a[part] for part in ("attention", "experts", "router"))
    with torch.device("meta"):
        assert sum(p.numel() for p in M6(shared).parameters()) == sum(b.values())


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "layers"), [({}, 1), ({"num_experts": 4, "experts_per_token": 2}, 2)])
def test_the_first_loss_after_parting_is_that_of_the_shared_network(
    tmp_path: Path, sizes: dict[str, Any], layers: int
) -> None:
    train(two_stages(tmp_path / "parted", sizes, layers=layers))
    shared = {**sizes, "distinct_layers": layers}
    train(
        tiny_recipe(tmp_path / "shared", model={"preset": "demo", "sizes": {**SIZES, "num_hidden_layers": 4, **shared}})
    )
    parted, together = losses(tmp_path / "parted"), losses(tmp_path / "shared")
    # The loss of step 5 is measured before its update: the function is the same. That of step 6 is another network's.
    assert {s: parted[s] for s in range(1, 6)} == {s: together[s] for s in range(1, 6)}
    assert parted[6] != together[6]
    config = Session.load(tmp_path / "parted" / "model").model.config
    assert config.distinct_layers is None


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train(two_stages(tmp_path / "whole", rewarm=2))
    for cut in (2, 4, 5):
        broken = two_stages(tmp_path / str(cut), rewarm=2)
        with pytest.raises(PowerCutError):
            train(broken, on_step=cut_at(cut))
        train(broken)
        assert losses(broken.output) == losses(tmp_path / "whole"), cut


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("how", ["rescale", "copy", "reset"])
def test_moments_of_the_copies(tmp_path: Path, optimizer: str, how: str) -> None:
    settings = TrainSection(steps=3, optimizer=optimizer)  # type: ignore[arg-type]
    batch = pack([example(np.random.default_rng(0), 4, 6)], 32, 0)
    shared = tiny_model(num_hidden_layers=4, distinct_layers=2).train()
    before = make_optimizers(shared, settings)
    shared(batch).loss.backward()
    for part in before:
        part.step()
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    checkpoints.save(3, Path.mkdir, shared, before, {})
    checkpoints.wait()

    whole = M6(tiny_config(num_hidden_layers=4)).train()
    after = make_optimizers(whole, settings)
    checkpoints.restore(tmp_path / "step-00000003", whole, after, shared=2, moments=how)

    names = {name: parameter for name, parameter in shared.named_parameters()}
    powers = {"exp_avg": 1, "momentum": 1, "exp_avg_sq": 2, "step": 0}
    for name, parameter in whole.named_parameters():
        source = names[_shared_name(name, 2)]
        assert torch.equal(parameter, source)
        found, expected = (
            {m: v for o in os for m, v in o.state.get(p, {}).items()}
            for os, p in ((after, parameter), (before, source))
        )
        if how == "reset" and name.startswith("blocks."):
            assert found == {}
            continue
        assert found.keys() == expected.keys() and found
        for moment, value in expected.items():
            share = 2 ** powers[moment] if how == "rescale" and name.startswith("blocks.") else 1
            torch.testing.assert_close(found[moment], value / share)


def test_rescaled_moments_are_those_of_the_single_layers() -> None:
    """The gradient of a shared layer is the sum of those its copies would have."""
    batch = pack([example(np.random.default_rng(0), 4, 6)], 32, 0)
    shared = tiny_model(num_hidden_layers=4, distinct_layers=1).train()
    whole = M6(tiny_config(num_hidden_layers=4)).train()
    whole.load_state_dict({n: shared.state_dict()[_shared_name(n, 1)] for n in whole.state_dict()})
    shared(batch).loss.backward()
    whole(batch).loss.backward()
    for name, parameter in shared.blocks[0].named_parameters():
        single = sum(block.get_parameter(name).grad for block in whole.blocks)
        torch.testing.assert_close(parameter.grad, single, atol=1e-5, rtol=1e-4)


def test_the_learning_rate_comes_up_again() -> None:
    settings = TrainSection(steps=100, warmup=0, schedule="constant")
    rates = [rate_at(step, settings, PseudoSection(steps=10, rewarm=4)) for step in range(8, 16)]
    assert rates == [1, 1, 0.25, 0.5, 0.75, 1, 1, 1]


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="distinct_layers is 3; it has to divide the 4 layers"):
        tiny_config(num_hidden_layers=4, distinct_layers=3)
    with pytest.raises(UsageError, match="would share a layer of experts with one without"):
        tiny_config(num_hidden_layers=4, distinct_layers=1, num_experts=4, expert_interval=2)
    with pytest.raises(UsageError, match="pseudo.steps .6. has to be below train.steps"):
        train(_checked(two_stages(tmp_path, steps=6)))


def _checked(recipe: Recipe) -> Recipe:
    from openm6.train.recipe import check_recipe

    return check_recipe(recipe.model_dump())

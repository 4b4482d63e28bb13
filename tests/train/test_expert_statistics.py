"""Experts in training: their logged statistics, and their balance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.model.experts import MixtureOfExperts, RouterStatistics
from openm6.train.distributed import Group, process_group
from openm6.train.expert_statistics import ExpertStatistics
from openm6.train.trainer import Trainer, train
from tests.conftest import EXPERTS, tiny_model
from tests.train.conftest import SIZES, PowerCutError, cut_at, logged, losses, tiny_recipe


def sparse(output: Path, sizes: dict[str, Any], **changes: Any) -> Any:
    model = {"preset": "demo", "sizes": {**SIZES, "num_experts": 8, "experts_per_token": 2, **sizes}}
    return tiny_recipe(output, model=model, **changes)


def logged_load(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "experts.jsonl").read_text("utf-8").splitlines()]


def test_loads_are_logged_and_drawn(tmp_path: Path) -> None:
    train(sparse(tmp_path, {"capacity_factor": 0.8}, steps=4, accumulate=2, log_every=2))
    lines = logged_load(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    tokens = [line for line in logged(tmp_path) if "loss" in line]
    for line, told in zip(lines, tokens, strict=True):
        for layer in range(2):
            counts = torch.tensor(line["load"][layer], dtype=torch.float64)
            # Every real position, twice: positions a second, times seconds.
            positions = told["tokens_per_second"] * told["seconds_per_step"] * 2
            assert int(counts.sum()) == pytest.approx(2 * positions, rel=1e-6)
            variation = float(counts.std(correction=0) / counts.mean())
            assert line["load_variation"][layer] == pytest.approx(variation, abs=1e-3)
            assert 0.05 < line["load_dropped"][layer] < 0.8
        assert told["load_variation"] == pytest.approx(sum(line["load_variation"]) / 2)
    assert (tmp_path / "experts.png").stat().st_size > 10_000
    assert Session.load(tmp_path / "model").model.config.num_experts == 8


def test_a_dense_model_has_no_loads(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, steps=2))
    assert not (tmp_path / "experts.jsonl").exists()
    assert "load_variation" not in logged(tmp_path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("router", ["topk", "prototype"])
def test_balance_evens_the_loads(tmp_path: Path, router: str) -> None:
    variation = {}
    for name, sizes in (("none", {}), ("loss", {"auxiliary_loss": 0.3}), ("bias", {"bias_update": 0.02})):
        train(sparse(tmp_path / name, {"router": router, **sizes}, steps=30, log_every=5, checkpoint_every=100))
        variation[name] = sum(logged_load(tmp_path / name)[-1]["load_variation"])
    assert max(variation["loss"], variation["bias"]) < 0.75 * variation["none"]


@pytest.mark.slow
def test_an_interrupted_run_with_moving_biases_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, broken = (sparse(tmp_path / name, {"bias_update": 0.01}) for name in ("whole", "broken"))
    train(whole)
    with pytest.raises(PowerCutError):
        train(broken, on_step=cut_at(4))
    train(broken)
    assert losses(broken.output) == losses(whole.output)


def test_a_bias_goes_down_where_there_is_too_much(tmp_path: Path) -> None:
    model = tiny_model(**EXPERTS, bias_update=0.1)
    found = ExpertStatistics(model, Group(0, 1, torch.device("cpu")))
    counts = torch.tensor([10, 4, 6, 20])
    found.add([RouterStatistics(counts, torch.tensor(0), torch.zeros(()))] * 2, more=False)
    found.finish_step()
    for block in model.blocks:
        assert isinstance(block.feed_forward, MixtureOfExperts)
        assert block.feed_forward.router.bias is not None
        assert block.feed_forward.router.bias.tolist() == pytest.approx([0.0, 0.1, 0.1, -0.1])


def test_the_auxiliary_loss_is_that_of_the_definition_over_all_parts() -> None:
    """N sum_i f_i P_i (Switch, equation 4), f over everything seen so far; 1 when even."""
    torch.manual_seed(0)
    layer = tiny_model(**{**EXPERTS, "router": "topk"}, auxiliary_loss=1.0).train().blocks[0].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    x = torch.randn(1, 50, 32)
    real = torch.arange(50)[None] < 40
    layer.earlier_tokens = torch.tensor([5, 0, 0, 7])
    _, statistics = layer(x, real)
    scores = (x[0, :40] @ layer.router.weight.T).softmax(-1)
    counts = torch.bincount(scores.topk(2).indices.flatten(), minlength=4)
    assert statistics.tokens_per_expert.tolist() == counts.tolist()
    share = (counts + layer.earlier_tokens) / (80 + 12)
    torch.testing.assert_close(statistics.loss, 4 * (share * scores.sum(0)).sum())


@pytest.mark.slow
def test_recomputation_changes_no_gradient_of_the_auxiliary_loss(tmp_path: Path) -> None:
    """The backward pass of a micro-batch recomputes the results of its forward pass."""
    for how in ("none", "full"):
        recipe = sparse(tmp_path / how, {"router": "topk", "auxiliary_loss": 1.0}, accumulate=4, learning_rate=1e-2)
        recipe.parallel.recompute = how
        train(recipe)
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


def test_the_z_loss_is_that_of_the_definition() -> None:
    """The mean over the groups of log(sum exp)^2 (ST-MoE, equation 5)."""
    torch.manual_seed(0)
    layer = tiny_model(**EXPERTS, router_z_loss=0.1).train().blocks[0].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    x = torch.randn(1, 50, 32)
    _, statistics = layer(x, torch.arange(50)[None] < 40)
    logits = (x[0, :40] @ layer.router.weight.T).view(40, 2, 2)
    torch.testing.assert_close(statistics.loss, 0.1 * logits.exp().sum(-1).log().square().mean(1).sum())


def test_another_number_of_experts_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(sparse(tmp_path, {}))
    with pytest.raises(UsageError, match=r"cannot be resumed: model.sizes.num_experts was 8 and is 4"):
        train(sparse(tmp_path, {"num_experts": 4}))


def test_a_nan_in_one_expert_stops_the_run(tmp_path: Path) -> None:
    with process_group() as group:
        trainer = Trainer(sparse(tmp_path, {}), group, on_step=None)
        trainer._resume()
        experts = trainer.model.blocks[1].feed_forward
        assert isinstance(experts, MixtureOfExperts)
        with torch.no_grad():
            experts.experts.up[3, 0, 0] = float("nan")
        batches = iter(trainer.loader)
        with pytest.raises(OpenM6Error, match="the gradient is not finite"):
            for _ in range(6):  # until a token goes there
                trainer._one_step(next(batches))

"""Training that stops when measures get no better keeps the weights of the best, also after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openm6.compress.compressed import lost
from openm6.core.errors import UsageError
from openm6.tasks import extend
from openm6.tasks.metrics import LOWER_IS_BETTER, METRICS
from openm6.train import sequences
from openm6.train.recipe import Recipe
from openm6.train.trainer import train
from tests.train.conftest import PowerCutError, cut_at, losses, tiny_recipe

SCORES = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.3, 6: 0.9}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Scores by the step instead of a measure's; the weights at each."""
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(self: sequences.SequenceObjective, model: torch.nn.Module):  # type: ignore[no-untyped-def]
        step = len(weights) % 10 + 1
        weights[step] = {name: value.clone() for name, value in model.state_dict().items()}
        yield "questions", {self.recipe.name: SCORES[step], "other": 0.0}

    monkeypatch.setattr(sequences.SequenceObjective, "evaluate", evaluate)
    return weights


@pytest.fixture
def an_error() -> Iterator[None]:
    """A metric of an extension, of which less is better; taken out again."""
    extend.register_metric("error", METRICS["iou"], lower_is_better=True)
    yield
    extend.register_metric("error", METRICS["iou"])
    assert "error" not in LOWER_IS_BETTER
    del METRICS["error"]


def stopping(output: Path, patience: int | None = 3, **changes: object) -> Recipe:
    data = [{"source": "demo:questions/validation?pictures=6", "task": "vqa"}]
    return tiny_recipe(output, evaluation={"every": 1, "patience": patience, "data": data}, keep=1, **changes)


@pytest.mark.slow
def test_it_stops_and_keeps_the_best(tmp_path: Path, measured: dict) -> None:
    model = train(stopping(tmp_path))
    assert len(measured) == 5 and len(losses(tmp_path)) == 5  # the best was the second: three more came
    kept = load_file(model / "model.safetensors")
    assert all(torch.equal(kept[name], measured[2][name]) for name in kept)
    assert any(not torch.equal(kept[name], measured[5][name]) for name in kept)
    steps = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == ["step-00000002", "step-00000005"]


@pytest.mark.slow
def test_once_stopped_it_says_how_to_go_on(tmp_path: Path, measured: dict, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = stopping(tmp_path, log_every=10)
    train(recipe)
    assert max(losses(tmp_path)) == 5  # what was learned last is logged too
    train(recipe)
    said = " ".join(capsys.readouterr().err.split())
    assert "(5 steps; it stopped because the measures got no better): nothing was trained" in said
    assert "For more steps: evaluation.patience=N, above 3;" in said
    recipe.evaluation.patience = 4
    train(recipe)
    assert max(losses(tmp_path)) == 6


def test_a_better_one_in_time_goes_on_to_the_end(tmp_path: Path, measured: dict) -> None:
    model = train(stopping(tmp_path, patience=4))
    assert len(measured) == 6
    kept = load_file(model / "model.safetensors")
    assert all(torch.equal(kept[name], measured[6][name]) for name in kept)


def test_an_interrupted_run_stops_where_it_would_have(tmp_path: Path, measured: dict) -> None:
    recipe = stopping(tmp_path)
    with pytest.raises(PowerCutError):
        train(recipe, cut_at(4))
    for step in range(4, len(measured) + 1):  # measured again from the last checkpoint on
        measured.pop(step, None)
    model = train(recipe)
    kept = load_file(model / "model.safetensors")
    assert all(torch.equal(kept[name], measured[2][name]) for name in kept)
    train(recipe)  # there is nothing left to do
    assert len(losses(tmp_path)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["perplexity", "error"])
def test_less_may_be_better(tmp_path: Path, measured: dict, metric: str, an_error: None) -> None:
    recipe = stopping(tmp_path, patience=2)
    recipe.name = metric
    model = train(recipe)
    kept = load_file(model / "model.safetensors")
    assert len(measured) == 3 and all(torch.equal(kept[name], measured[1][name]) for name in kept)


def test_a_compression_loses_what_a_lower_error_gains() -> None:
    parent, row = (
        {"metrics": {"vqa": {metric: value}}} for metric, value in (("perplexity", 2.0), ("perplexity", 1.5))
    )
    assert lost(parent, row) == -0.25 and lost(row, parent) == pytest.approx(1 / 3)


def test_patience_needs_a_measure(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give evaluation.data"):
        tiny_recipe(tmp_path, evaluation={"patience": 2})

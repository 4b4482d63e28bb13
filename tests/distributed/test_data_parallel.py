"""Two processes under torchrun give the losses and the weights of one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openm6.inference.session import Session
from openm6.model.codec import Codec, CodecConfig
from openm6.model.files import save_network
from openm6.tasks.card import read_seen_tokens
from openm6.train.trainer import train
from tests.processes import call_openm6, run_ranks
from tests.train.conftest import SIZES, logged, losses, recipe_file, tiny_recipe

OPENM6 = Path(sys.executable).with_name("openm6")


def torchrun(recipe: Path, processes: int, *changes: str) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--no-python", str(OPENM6), "train", str(recipe), *changes,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def by_forks(recipe: Path, processes: int, *changes: str) -> None:
    """As by torchrun, without its start, which `test_two_processes_equal_one` has, or that of `--processes`, which
    tests/train/test_launch.py has."""
    run_ranks(processes, call_openm6, ["train", str(recipe), *changes])


@pytest.mark.slow
@pytest.mark.parametrize(("run", "accumulate"), [(torchrun, 2), (by_forks, 1)])
def test_two_processes_equal_one(tmp_path: Path, run: Callable[..., None], accumulate: int) -> None:
    alone = tiny_recipe(tmp_path / "one", accumulate=accumulate)
    train(alone)
    recipe = recipe_file(alone, tmp_path)
    run(recipe, 2, f"output={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = (Session.load(tmp_path / n / "model", trainable=True).model.state_dict() for n in ("one", "two"))
    assert read_seen_tokens(tmp_path / "two" / "model") == read_seen_tokens(tmp_path / "one" / "model")
    # AdamW steps by the sign of a gradient however small: a bias whose gradient is rounding noise may go either way.
    # So nearly all weights have to agree closely, and none may be further apart than the steps that were taken.
    apart = torch.cat([(theirs[name] - value).abs().flatten() for name, value in ours.items()])
    assert (apart > 1e-4).double().mean() < 1e-3
    assert apart.max() < alone.train.steps * alone.train.learning_rate


@pytest.mark.slow
def test_pairs_of_two_processes_are_told_apart_from_all_others(tmp_path: Path) -> None:
    data = [{"source": "demo:items/train?pictures=40", "task": "text_vector", "against": "image_vector"}]
    alone = tiny_recipe(tmp_path / "one", data=data, vectors={"dims": [8, 32]}, steps=3)
    train(alone)
    by_forks(recipe_file(alone, tmp_path), 2, f"output={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_process_without_a_pair_and_one_without_a_target_go_on_together(tmp_path: Path) -> None:
    data = [
        {"source": "demo:items/train?pictures=40", "task": "text_vector", "against": "image_vector", "name": "pairs"},
        {"source": "demo:questions/train?pictures=40", "task": "vqa", "name": "questions"},
    ]
    experts = {"num_experts": 4, "experts_per_token": 1, "auxiliary_loss": 0.1}
    model = {"preset": "demo", "sizes": {**SIZES, **experts, "tie_word_embeddings": False}}
    alone = tiny_recipe(tmp_path / "one", data=data, model=model, batch_size=4, steps=3)
    train(alone)
    for name, parallel in (("plain", "{sharding: none}"), ("sharded", "{sharding: zero3, experts: 2}")):
        by_forks(recipe_file(alone, tmp_path), 2, f"output={tmp_path / name}", f"parallel={parallel}")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_processes_with_other_kinds_of_pictures_go_on_together(tmp_path: Path) -> None:
    """Texts, pictures filled in by passes and pictures written in a line are worked on apart where pictures are
    block-sparse, and each of two processes has two examples a step."""
    torch.manual_seed(0)
    save_network(Codec(CodecConfig(image_size=16, widths=[8, 16], patch=2, levels=[4, 4])), tmp_path / "codec")
    data = [
        {"source": "demo:catalogue/train?pictures=40", "task": "text_to_image"},
        {"source": "demo:catalogue/train?pictures=40", "task": "caption"},
    ]
    tiles = {"picture_side": 4, "picture_tile": [4, 4]}
    experts = {"num_experts": 4, "experts_per_token": 1, "auxiliary_loss": 0.1, "bias_update": 0.01}
    model = {"preset": "demo", "codec": str(tmp_path / "codec"), "sizes": {**SIZES, **tiles, **experts}}
    alone = tiny_recipe(tmp_path / "one", data=data, model=model, batch_size=4, row_length=160, steps=3)
    train(alone)
    for name, parallel in (("plain", "{sharding: none}"), ("sharded", "{sharding: zero3, experts: 2}")):
        by_forks(recipe_file(alone, tmp_path), 2, f"output={tmp_path / name}", f"parallel={parallel}")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_rows_of_new_tokens_are_trained_by_two_as_by_one(tmp_path: Path) -> None:
    base = train(tiny_recipe(tmp_path / "base", steps=2))
    data = [{"source": "demo:texts/train?pictures=40", "task": "text_continuation"}]
    alone = tiny_recipe(tmp_path / "one", model={"path": str(base)}, adapt={"rank": 4}, data=data, steps=3)
    weights = load_file(train(alone) / "adapter_model.safetensors")
    assert any("trainable_tokens_delta" in name for name in weights)
    for sharding in ("none", "zero3"):
        by_forks(recipe_file(alone, tmp_path), 2, f"output={tmp_path / sharding}", f"parallel.sharding={sharding}")
        assert losses(tmp_path / sharding) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        assert weights.keys() == load_file(tmp_path / sharding / "model" / "adapter_model.safetensors").keys()


@pytest.mark.slow
def test_a_sharded_network_is_measured_as_one(tmp_path: Path) -> None:
    """Also with experts on several processes, and without any process that holds the whole."""
    evaluation = {
        "every": 3, "limit": 6,
        "data": [
            {"source": "demo:questions/test?pictures=5", "task": "vqa"},
            {"source": "demo:texts/test?pictures=5", "task": "text_continuation"},
        ],
    }  # fmt: skip
    model = {"preset": "demo", "sizes": {**SIZES, "num_experts": 4, "experts_per_token": 1}}
    alone = tiny_recipe(tmp_path / "one", evaluation=evaluation, model=model)
    train(alone)
    recipe = recipe_file(alone, tmp_path)
    by_forks(recipe, 2, f"output={tmp_path / 'two'}", "parallel={sharding: zero3, experts: 2, offload: 0.5}")
    ours, theirs = ([line for line in logged(tmp_path / name) if "evaluation" in line] for name in ("one", "two"))
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        if "perplexity" in mine:
            assert other["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-3)
    assert sum("perplexity" in mine for mine in ours) == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_run_of_two_is_continued_by_one(tmp_path: Path) -> None:
    whole = tiny_recipe(tmp_path / "whole")
    train(whole)
    recipe = recipe_file(whole, tmp_path)
    # The same schedule, stopped half-way by deleting what came later.
    by_forks(recipe, 2, f"output={tmp_path / 'two'}", "train.keep=9")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000006")
    train(tiny_recipe(tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)

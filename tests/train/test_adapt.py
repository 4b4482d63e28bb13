"""LoRA: the network beneath stays, the adapter is small, and what they answer together is B A added by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.model.files import load_model
from openm6.train.recipe import Recipe
from openm6.train.trainer import train
from tests.train.conftest import PowerCutError, cut_at, losses, tiny_recipe

ADAPT = {"rank": 4, "alpha": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe(tmp_path_factory.mktemp("base")))


def adapting(base: Path, output: Path, **changes: object) -> Recipe:
    data = [{"source": "demo:questions/train?pictures=20", "task": "vqa"}]
    return tiny_recipe(output, model={"path": str(base)}, adapt=ADAPT, data=data, learning_rate=2e-2, **changes)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(adapting(base, tmp_path_factory.mktemp("adapted")))


def by_hand(base: Path, adapter: Path) -> dict[str, Tensor]:
    """W + alpha / rank B A in fp64; rows of tokens that the base has not met are the adapter's."""
    weights = {name: value.double() for name, value in load_model(base).state_dict().items()}
    own = load_file(adapter / "adapter_model.safetensors")
    for name, a in own.items():
        if ".lora_A." in name:
            b = own[name.replace(".lora_A.", ".lora_B.")]
            place = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[place] = weights[place] + ADAPT["alpha"] / ADAPT["rank"] * b.double() @ a.double()
    rows = json.loads((adapter / "adapter_config.json").read_text("utf-8"))["trainable_token_indices"]["embed"]
    weights["embed.weight"][rows] = own["base_model.model.embed.token_adapter.trainable_tokens_delta"].double()
    return weights


@pytest.mark.slow
def test_an_adapter_is_loaded_with_the_model_beneath(base: Path, adapter: Path) -> None:
    assert not (adapter / "model.safetensors").exists() and not (adapter / "tokenizer.json").exists()
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert size < 0.3 * (base / "model.safetensors").stat().st_size
    loaded = Session.load(adapter, "cpu", trainable=True).model.state_dict()
    expected = by_hand(base, adapter)
    assert loaded.keys() == expected.keys()
    changed = 0
    for name, value in load_model(base).state_dict().items():
        torch.testing.assert_close(loaded[name].double(), expected[name], atol=1e-6, rtol=1e-5)
        if name.split(".")[-2] in ("qkv", "out", "up", "down", "embed"):
            assert not torch.equal(loaded[name], value), name
            changed += 1
        else:
            assert torch.equal(loaded[name], value), name
    assert changed == 9


def test_what_was_trained_is_what_is_loaded(base: Path, tmp_path: Path) -> None:
    """The measure of the last step in training and that of the loaded adapter are one."""
    from openm6.evaluate.command import measure

    source = "demo:questions/validation?pictures=10"
    evaluation = {"every": 6, "data": [{"source": source, "task": "vqa", "name": "q"}]}
    output = tmp_path / "run"
    adapter = train(adapting(base, output, evaluation=evaluation, steps=12))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [line for line in lines if "evaluation" in line][-1]
    found = measure(Session.load(adapter, trainable=True), "vqa", source, limit=256, answers=False).values()
    assert found == pytest.approx({name: trained[name] for name in found})


def test_peft_opens_it(base: Path, adapter: Path) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().state_dict()
    ours = Session.load(adapter, "cpu", trainable=True).model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_an_interrupted_run_goes_on_bit_for_bit(base: Path, adapter: Path, tmp_path: Path) -> None:
    recipe = adapting(base, tmp_path / "cut")
    with pytest.raises(PowerCutError):
        train(recipe, cut_at(4))
    again = train(recipe)
    assert losses(recipe.output) == losses(adapter.parent)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (again, adapter))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpoints_hold_the_adapter_alone(base: Path, adapter: Path) -> None:
    size = sum(f.stat().st_size for f in (adapter.parent / "checkpoints" / "step-00000006").rglob("*") if f.is_file())
    assert size < (base / "model.safetensors").stat().st_size


def test_merged_it_is_a_model_like_any(adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    result = CliRunner().invoke(commands(), ["models", "merge", str(adapter), str(merged)])
    assert result.exit_code == 0, result.output
    ours, theirs = (Session.load(p, "cpu", trainable=True) for p in (merged, adapter))
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert ours.tasks.keys() == theirs.tasks.keys() >= {"vqa"}
    train(tiny_recipe(tmp_path / "on", model={"path": str(merged)}, steps=1, checkpoint_every=1))


def test_what_cannot_be_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give model\.path"):
        tiny_recipe(tmp_path, adapt=ADAPT)
    with pytest.raises(UsageError, match="openm6 models merge"):
        train(adapting(adapter, tmp_path / "twice"))
    lost = tmp_path / "lost"
    shutil.copytree(adapter, lost)
    config = json.loads((lost / "adapter_config.json").read_text("utf-8"))
    (lost / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nowhere"}), "utf-8")
    with pytest.raises(UsageError, match="adapter of the model nowhere"):
        Session.load(lost)
    (lost / "adapter_config.json").write_text("{", "utf-8")
    with pytest.raises(OpenM6Error, match="damaged"):
        Session.load(lost)
    cut = tmp_path / "cut"
    shutil.copytree(adapter, cut)
    content = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OpenM6Error, match="damaged"):
        Session.load(cut)
    (cut / "adapter_model.safetensors").unlink()
    with pytest.raises(OpenM6Error, match="pickled"):
        Session.load(cut)


def test_an_adapter_of_another_size_is_refused(adapter: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "stem_widths": [8, 8, 8], "image_max_patches": 4}  # fmt: skip
    other = train(tiny_recipe(tmp_path / "other", model={"preset": "demo", "sizes": sizes}, steps=1))
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text("utf-8"))
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}), "utf-8")
    with pytest.raises(OpenM6Error, match="does not fit"):
        Session.load(moved)

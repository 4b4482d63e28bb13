"""All forms of adapters: they start as the network beneath, train a small part, are loaded as they were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from openm6.batches import pad
from openm6.bundle import Bundle
from openm6.cli import commands
from openm6.errors import OpenM6Error, UsageError
from openm6.evaluate.command import measure
from openm6.model.adapters import METHODS, adapter_config, add_adapter
from openm6.model.files import meta_model
from openm6.train.distributed import Group
from openm6.train.recipe import Recipe
from openm6.train.sequences import Sequences
from openm6.train.start import start_from
from openm6.train.trainer import train
from tests.tasks.conftest import picture
from tests.train.conftest import SIZES, PowerCutError, cut_at, losses, tiny_recipe

QUESTIONS = "demo:questions/train?pictures=20"
BESIDE = ("lora", "ia3", "bottleneck")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe(tmp_path_factory.mktemp("base"), learning_rate=1e-2))


def adapting(base: Path, output: Path, method: str, **changes: object) -> Recipe:
    data = [{"source": QUESTIONS, "task": "vqa"}]
    adapt = {"method": method, "rank": 4, "alpha": 8, "length": 3}
    return tiny_recipe(output, model={"path": str(base)}, adapt=adapt, data=data, learning_rate=3e-2, **changes)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {method: train(adapting(base, tmp_path_factory.mktemp(method), method)) for method in METHODS}


def hidden(bundle: Bundle, seed: int = 0, question: str = "图中是什么?") -> torch.Tensor:
    """Logits at the position that begins the answer, in fp32 where the weights are."""
    prompt = bundle.prompt(bundle.task("vqa"), {"photo": picture(seed=seed), "question": question})
    with torch.inference_mode(), bundle.precision(), torch.autocast("cpu", enabled=False):
        found, _ = bundle.model.prefill(pad([prompt], 0), len(prompt) + 4)
        return bundle.model.logits(found)[0]


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_network_beneath_and_trains_a_part_of_it(base: Path, method: str) -> None:
    config = adapter_config(base, method, rank=4, length=3)
    plain = Bundle.load(base, "cpu", trainable=True)
    model = meta_model(plain.model.config)
    add_adapter(model, config)
    model = model.to_empty(device="cpu")
    start_from(model, base, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < (0.5 if method == "head" else 0.25) * sum(p.numel() for p in model.parameters())
    if method not in ("prompt", "prefix"):
        adapted = Bundle(model.eval(), plain.processor, plain.tasks.values())
        torch.testing.assert_close(hidden(adapted), hidden(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_answers_and_still_sees_the_whole_source(base: Path, adapters: dict[str, Path], method: str) -> None:
    plain, adapted = (Bundle.load(path, "cpu", trainable=True) for path in (base, adapters[method]))
    assert not torch.allclose(hidden(adapted), hidden(plain), atol=1e-3)
    assert not torch.allclose(hidden(adapted, seed=0), hidden(adapted, seed=1), atol=1e-6)  # a pixel
    task = adapted.task("vqa")
    prompts = [adapted.prompt(task, {"photo": picture(), "question": "红" * 6 + end}) for end in "左右"]
    with torch.inference_mode():
        first = [adapted.model(pad([prompt], 0)).hidden[0, adapted.processor.prompt] for prompt in prompts]
    assert not torch.equal(*first)  # the last character reaches the first position


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_is_loaded(base: Path, tmp_path: Path, method: str) -> None:
    source = "demo:questions/validation?pictures=6"
    evaluation = {"every": 100, "data": [{"source": source, "task": "vqa", "name": "q"}]}
    adapter = train(adapting(base, tmp_path / "run", method, evaluation=evaluation, steps=3, checkpoint_every=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [line for line in lines if "evaluation" in line][-1]
    found = measure(Bundle.load(adapter, "cpu", trainable=True), "vqa", source, limit=256, answers=False).values()
    assert found == pytest.approx({name: trained[name] for name in found})
    packed, unpacked = (Bundle.load(adapter, "cpu", trainable=t) for t in (False, True))
    packed.model.packed_head = None
    torch.testing.assert_close(hidden(packed), hidden(unpacked), atol=0.08, rtol=0.05)  # bf16, on some machines


@pytest.mark.parametrize("method", ["ia3", "bottleneck", "prefix", "head"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    base: Path, adapters: dict[str, Path], tmp_path: Path, method: str
) -> None:
    recipe = adapting(base, tmp_path / "cut", method)
    with pytest.raises(PowerCutError):
        train(recipe, cut_at(4))
    again = train(recipe)
    assert losses(recipe.output) == losses(adapters[method].parent)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (again, adapters[method]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lora_on_experts_trains_them_and_is_merged(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_experts": 2, "experts_per_token": 1, "expert_interval": 1}
    base = train(tiny_recipe(tmp_path / "base", model={"preset": "demo", "sizes": sizes}, steps=2))
    adapt = {"method": "lora", "rank": 2, "alpha": 4, "experts": True}
    data = [{"source": QUESTIONS, "task": "vqa"}]
    model = {"path": str(base)}
    adapter = train(tiny_recipe(tmp_path / "run", model=model, adapt=adapt, data=data, learning_rate=3e-2, steps=3))
    assert any("experts" in name for name in load_file(adapter / "adapter_model.safetensors"))
    plain, adapted = (Bundle.load(path, "cpu", trainable=True).model.state_dict() for path in (base, adapter))
    assert plain.keys() == adapted.keys()
    assert not torch.equal(plain["blocks.0.feed_forward.experts.up"], adapted["blocks.0.feed_forward.experts.up"])


@pytest.mark.parametrize("trainable", [True, False])
def test_several_adapters_share_one_model(base: Path, adapters: dict[str, Path], trainable: bool) -> None:
    """Each answers as it does alone, merged, and without any the base answers; nothing is loaded in between."""
    beside = {name: adapters[name] for name in BESIDE}
    shared = Bundle.load(base, "cpu", trainable, adapters=beside)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if trainable else {"atol": 0.08, "rtol": 0.05}
    weights = {id(p) for p in shared.model.parameters()}
    for name in (*BESIDE, None, *reversed(BESIDE)):
        alone = Bundle.load(adapters[name] if name else base, "cpu", trainable)
        view = shared.adapter(name)
        torch.testing.assert_close(hidden(view), hidden(alone), **tolerance)
        assert view.run("vqa", photo=picture(), question="什么?") is not None
        assert {id(p) for p in view.model.parameters()} == weights
    torch.testing.assert_close(hidden(shared), hidden(Bundle.load(base, "cpu", trainable)), **tolerance)
    view, asked, pieces = shared.adapter(BESIDE[0]), {"photo": picture(), "question": "什么?"}, []
    for piece in view.stream("vqa", **asked):  # the text goes on as it began, whoever asks between two pieces
        pieces.append(piece)
        shared.run("vqa", **asked)
    assert "".join(pieces) == view.run("vqa", **asked)


def test_a_head_is_merged_and_a_prompt_is_not(adapters: dict[str, Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = CliRunner().invoke(commands(), ["models", "merge", str(adapters["head"]), str(merged)])
    assert done.exit_code == 0, done.output
    ours, theirs = (Bundle.load(p, "cpu", trainable=True) for p in (merged, adapters["head"]))
    torch.testing.assert_close(hidden(ours), hidden(theirs))
    done = CliRunner().invoke(commands(), ["models", "merge", str(adapters["prompt"]), str(tmp_path / "no")])
    assert isinstance(done.exception, UsageError) and "stays beside its model" in str(done.exception)


def test_what_cannot_be_is_told(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has to be|open it alone"):
        Bundle.load(base, "cpu", adapters={"p": adapters["prompt"]})
    with pytest.raises(UsageError, match="is no adapter of .* none at all"):
        Bundle.load(base, "cpu", adapters={"p": base})
    with pytest.raises(UsageError, match="cannot name an adapter"):
        Bundle.load(base, "cpu", adapters={"a.b": adapters["lora"]})
    shared = Bundle.load(base, "cpu", adapters={"copy": adapters["lora"]})
    with pytest.raises(UsageError, match='no adapter copi. Did you mean "copy"'):
        shared.adapter("copi")
    with pytest.raises(UsageError, match="opened without any"):
        Bundle.load(base, "cpu").adapter("copy")
    strange = tmp_path / "strange"
    shutil.copytree(adapters["bottleneck"], strange)
    config = json.loads((strange / "adapter_config.json").read_text("utf-8"))
    (strange / "adapter_config.json").write_text(json.dumps({**config, "method": "magic"}), "utf-8")
    with pytest.raises(OpenM6Error, match="of the kind magic; known are lora"):
        Bundle.load(strange, "cpu")
    (strange / "adapter_config.json").write_text(json.dumps({**config, "rank": 7}), "utf-8")
    with pytest.raises(OpenM6Error, match="does not fit"):
        Bundle.load(strange, "cpu")


def test_an_adapter_of_another_base_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    with pytest.raises(UsageError, match="is no adapter of .*other: it is one of"):
        Bundle.load(other, "cpu", adapters={"copy": adapters["lora"]})


def test_training_counts_what_it_trains(base: Path, tmp_path: Path) -> None:
    recipe = adapting(base, tmp_path, "prefix")
    parts = Sequences(recipe, Group(0, 1, torch.device("cpu")))
    model = parts.network(shared=False)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt.weight"]
    assert parts.bundle.processor.prompt == 3 and len(model.prompt.weight) == model.config.num_hidden_layers

"""All forms of adapters: they start as the network beneath, train a small part, are loaded as they were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.batch import pad
from openm6.core.errors import OpenM6Error, UsageError
from openm6.edge.runner import EdgeModel
from openm6.evaluate.command import measure
from openm6.inference.session import Session
from openm6.model.adapters import METHODS, adapter_config, add_adapter
from openm6.model.cache import prefill
from openm6.model.files import load_model, meta_model
from openm6.train.distributed import Group
from openm6.train.recipe import Recipe
from openm6.train.sequences import SequenceObjective
from openm6.train.start import start_from
from openm6.train.trainer import train
from tests.tasks.conftest import picture
from tests.train.conftest import SIZES, PowerCutError, cut_at, logged, losses, tiny_recipe

QUESTIONS = "demo:questions/train?pictures=20"
NEW_QUESTIONS = "demo:questions/validation?pictures=6"
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
    """One of each form, measured at its end."""
    evaluation = {"every": 100, "data": [{"source": NEW_QUESTIONS, "task": "vqa", "name": "q"}]}
    return {
        method: train(adapting(base, tmp_path_factory.mktemp(method), method, evaluation=evaluation))
        for method in METHODS
    }


def hidden(session: Session, seed: int = 0, question: str = "图中是什么?") -> torch.Tensor:
    """Logits at the position that begins the answer, in fp32 where the weights are."""
    prompt = session.prompt(session.task("vqa"), {"photo": picture(seed=seed), "question": question})
    with torch.inference_mode(), session.precision(), torch.autocast("cpu", enabled=False):
        found, _ = prefill(session.model, pad([prompt], 0), len(prompt) + 4)
        return session.model.logits(found)[0]


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_network_beneath_and_trains_a_part_of_it(base: Path, method: str) -> None:
    config = adapter_config(base, method, rank=4, length=3)
    plain = Session.load(base, "cpu", trainable=True)
    model = meta_model(plain.model.config)
    add_adapter(model, config)
    model = model.to_empty(device="cpu")
    start_from(model, base, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < (0.5 if method == "head" else 0.25) * sum(p.numel() for p in model.parameters())
    if method not in ("prompt", "prefix"):
        adapted = Session(model.eval(), plain.processor, plain.tasks.values())
        torch.testing.assert_close(hidden(adapted), hidden(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_answers_and_still_sees_the_whole_source(base: Path, adapters: dict[str, Path], method: str) -> None:
    plain, adapted = (Session.load(path, "cpu", trainable=True) for path in (base, adapters[method]))
    assert not torch.allclose(hidden(adapted), hidden(plain), atol=1e-3)
    assert not torch.allclose(hidden(adapted, seed=0), hidden(adapted, seed=1), atol=1e-6)  # a pixel
    task = adapted.task("vqa")
    prompts = [adapted.prompt(task, {"photo": picture(), "question": "红" * 6 + end}) for end in "左右"]
    with torch.inference_mode():
        first = [adapted.model(pad([prompt], 0)).hidden[0, adapted.processor.prompt] for prompt in prompts]
    assert not torch.equal(*first)  # the last character reaches the first position


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_is_loaded(adapters: dict[str, Path], method: str) -> None:
    adapter = adapters[method]
    trained = [line for line in logged(adapter.parent) if "evaluation" in line][-1]
    session = Session.load(adapter, "cpu", trainable=True)
    found = measure(session, "vqa", NEW_QUESTIONS, limit=256, answers=False).values()
    assert found == pytest.approx({name: trained[name] for name in found})
    packed, unpacked = (Session.load(adapter, "cpu", trainable=t) for t in (False, True))
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


@pytest.mark.slow
def test_lora_on_experts_trains_them_and_is_merged(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_experts": 2, "experts_per_token": 1, "expert_interval": 1}
    base = train(tiny_recipe(tmp_path / "base", model={"preset": "demo", "sizes": sizes}, steps=2))
    adapt = {"method": "lora", "rank": 2, "alpha": 4, "experts": True}
    data = [{"source": QUESTIONS, "task": "vqa"}]
    model = {"path": str(base)}
    adapter = train(tiny_recipe(tmp_path / "run", model=model, adapt=adapt, data=data, learning_rate=3e-2, steps=3))
    assert any("experts" in name for name in load_file(adapter / "adapter_model.safetensors"))
    plain, adapted = (Session.load(path, "cpu", trainable=True).model.state_dict() for path in (base, adapter))
    assert plain.keys() == adapted.keys()
    assert not torch.equal(plain["blocks.0.feed_forward.experts.up"], adapted["blocks.0.feed_forward.experts.up"])


@pytest.mark.parametrize("trainable", [True, False])
def test_several_adapters_share_one_model(base: Path, adapters: dict[str, Path], trainable: bool) -> None:
    """Each answers as it does alone, merged, and without any the base answers; nothing is loaded in between."""
    beside = {name: adapters[name] for name in BESIDE}
    shared = Session.load(base, "cpu", trainable, adapters=beside)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if trainable else {"atol": 0.08, "rtol": 0.05}
    weights = {id(p) for p in shared.model.parameters()}
    for name in (*BESIDE, None, *reversed(BESIDE)):
        alone = Session.load(adapters[name] if name else base, "cpu", trainable)
        view = shared.adapter(name)
        torch.testing.assert_close(hidden(view), hidden(alone), **tolerance)
        assert view.run("vqa", photo=picture(), question="什么?") is not None
        assert {id(p) for p in view.model.parameters()} == weights
    torch.testing.assert_close(hidden(shared), hidden(Session.load(base, "cpu", trainable)), **tolerance)
    view, asked, pieces = shared.adapter(BESIDE[0]), {"photo": picture(), "question": "什么?"}, []
    for piece in view.stream("vqa", **asked):  # the text goes on as it began, whoever asks between two pieces
        pieces.append(piece)
        shared.run("vqa", **asked)
    assert "".join(pieces) == view.run("vqa", **asked)


def by_peft(base: Path, adapter: Path, output: Path, **changes: object) -> PeftModel:
    """An adapter that PEFT writes, of random weights, as its own network runs it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r"blocks\..*\.(qkv|out|up|down)", **changes)
    theirs = get_peft_model(load_model(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2).abs_() if "magnitude" in name else parameter.normal_(std=0.2)
    config.base_model_name_or_path = str(base)
    theirs.save_pretrained(output, save_embedding_layers=False)
    shutil.copy(adapter / "openm6.json", output)
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"qkv": 2}, "alpha_pattern": {"down": 3, r"blocks\.0\.attention\.qkv": 7}},
        {"use_rslora": True, "rank_pattern": {"up": 8}, "alpha_pattern": {"up": 5}},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
    ],
)
def test_what_peft_says_of_an_adapter_holds(
    base: Path, adapters: dict[str, Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    """Merged and beside a model it answers as PEFT's own network; what cannot stand beside one is refused by name."""
    theirs = by_peft(base, adapters["lora"], tmp_path / "peft", **changes)
    plain, alone = (Session.load(path, "cpu", trainable=True) for path in (base, tmp_path / "peft"))
    expected = hidden(Session(theirs.base_model.model.eval(), plain.processor, plain.tasks.values()))
    assert not torch.allclose(expected, hidden(plain), atol=1e-2)
    torch.testing.assert_close(hidden(alone), expected, atol=1e-4, rtol=1e-4)
    if "use_dora" in changes or "modules_to_save" in changes:
        with pytest.raises(UsageError, match=f"{next(iter(changes))}, which cannot share a model: open it alone"):
            Session.load(base, "cpu", adapters={"peft": tmp_path / "peft"})
        return
    beside = Session.load(base, "cpu", trainable=True, adapters={"peft": tmp_path / "peft"})
    torch.testing.assert_close(hidden(beside.adapter("peft")), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_a_tensor_more_or_less_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for method in ("lora", "ia3"):
        weights = load_file(adapters[method] / "adapter_model.safetensors")
        first = min(weights)
        for name, changed in (
            ("less", {key: value for key, value in weights.items() if key != first}),
            ("more", {**weights, first.replace(".0.", ".9."): weights[first].clone()}),
        ):
            folder = tmp_path / f"{method}-{name}"
            shutil.copytree(adapters[method], folder)
            save_file(changed, folder / "adapter_model.safetensors")
            with pytest.raises(OpenM6Error, match="does not fit"):
                Session.load(folder, "cpu")
            if (method, name) != ("ia3", "less"):  # each of its factors stands for itself
                with pytest.raises(OpenM6Error, match="does not fit"):
                    Session.load(base, "cpu", adapters={"a": folder})


def test_a_head_is_merged_and_a_prompt_is_not(adapters: dict[str, Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = CliRunner().invoke(commands(), ["models", "merge", str(adapters["head"]), str(merged)])
    assert done.exit_code == 0, done.output
    ours, theirs = (Session.load(p, "cpu", trainable=True) for p in (merged, adapters["head"]))
    torch.testing.assert_close(hidden(ours), hidden(theirs))
    done = CliRunner().invoke(commands(), ["models", "merge", str(adapters["prompt"]), str(tmp_path / "no")])
    assert isinstance(done.exception, UsageError) and "stays beside its model" in str(done.exception)


def command(*words: object) -> None:
    done = CliRunner().invoke(commands(), [str(word) for word in words])
    if done.exception:
        raise done.exception
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_commands_that_make_a_model_of_a_model_take_an_adapter(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """They merge it, or say in one sentence that it has to be merged, or cannot be."""
    adapter, merged = adapters["lora"], tmp_path / "merged"
    command("models", "merge", adapter, merged)
    examples = tmp_path / "some.jsonl"
    examples.write_text('{"text": "又轻又软", "label": "好评"}\n', "utf-8")
    makers: dict[str, tuple[object, ...]] = {
        "quantize": (), "prune": ("--task", "text_classification", "--data", examples, "--layers", 1),
        "upcycle": ("--num-experts", 2),
    }  # fmt: skip
    for name, words in makers.items():
        for number, path in enumerate((adapter, merged)):
            command("models", name, path, tmp_path / f"{name}-{number}", *words)
        ours, theirs = (load_model(tmp_path / f"{name}-{number}").state_dict() for number in (0, 1))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for path in (adapters["bottleneck"], adapters["prompt"]):
        for name, words in ({**makers, "export": ()}).items():
            with pytest.raises(UsageError, match="stays beside its model"):
                command("models", name, path, tmp_path / "none", *words)
    with pytest.raises(UsageError, match="is an adapter: make it a model first"):
        command("cascade", "init", tmp_path / "box", "--model", adapter)
    chain = tmp_path / "chain.yaml"
    tasks = "[{task: vqa, data: a, validation: b}]"
    chain.write_text(f"{{model: {adapter}, output: {tmp_path / 'out'}, tasks: {tasks}}}", "utf-8")
    with pytest.raises(UsageError, match="is an adapter: make it a model first"):
        command("compress", chain)
    assert not (tmp_path / "none").exists() and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "head"])
def test_an_adapter_is_exported_as_it_is_merged(adapters: dict[str, Path], tmp_path: Path, method: str) -> None:
    command("models", "export", adapters[method], tmp_path / "package")
    asked = {"photo": picture(), "question": "图中是什么?"}
    answer = EdgeModel(tmp_path / "package").answer("vqa", asked)
    session = Session.load(adapters[method], "cpu", trainable=True)
    prompt = session.prompt(session.task("vqa"), asked)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        found, _ = prefill(session.model, pad([prompt], 0), len(prompt) + 4)
    assert answer.state is not None
    torch.testing.assert_close(torch.from_numpy(answer.state), found[0], atol=1e-3, rtol=1e-3)


def test_what_cannot_be_is_told(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has to be|open it alone"):
        Session.load(base, "cpu", adapters={"p": adapters["prompt"]})
    with pytest.raises(UsageError, match="is no adapter of .* none at all"):
        Session.load(base, "cpu", adapters={"p": base})
    with pytest.raises(UsageError, match="cannot name an adapter"):
        Session.load(base, "cpu", adapters={"a.b": adapters["lora"]})
    shared = Session.load(base, "cpu", adapters={"copy": adapters["lora"]})
    with pytest.raises(UsageError, match='no adapter copi. Did you mean "copy"'):
        shared.adapter("copi")
    with pytest.raises(UsageError, match="opened without any"):
        Session.load(base, "cpu").adapter("copy")
    strange = tmp_path / "strange"
    shutil.copytree(adapters["bottleneck"], strange)
    config = json.loads((strange / "adapter_config.json").read_text("utf-8"))
    (strange / "adapter_config.json").write_text(json.dumps({**config, "method": "magic"}), "utf-8")
    with pytest.raises(OpenM6Error, match="of the kind magic; known are lora"):
        Session.load(strange, "cpu")
    (strange / "adapter_config.json").write_text(json.dumps({**config, "rank": 7}), "utf-8")
    with pytest.raises(OpenM6Error, match="does not fit"):
        Session.load(strange, "cpu")


def test_an_adapter_of_another_base_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    with pytest.raises(UsageError, match="is no adapter of .*other: it is one of"):
        Session.load(other, "cpu", adapters={"copy": adapters["lora"]})


def test_training_counts_what_it_trains(base: Path, tmp_path: Path) -> None:
    recipe = adapting(base, tmp_path, "prefix")
    parts = SequenceObjective(recipe, Group(0, 1, torch.device("cpu")))
    model = parts.network(shared=False)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt.weight"]
    assert parts.session.processor.prompt == 3 and len(model.prompt.weight) == model.config.num_hidden_layers

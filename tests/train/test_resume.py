"""An existing run and a recipe: it is resumed, finished, or refused and left as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.compress.compress import _Work, check_chain
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import lock_output
from openm6.tasks.library import get
from openm6.train.distill import teacher_answers
from openm6.train.distributed import Group
from openm6.train.recipe import Recipe, load_recipe
from openm6.train.resume import check_resumption
from openm6.train.setup import open_section
from openm6.train.trainer import train
from tests.conftest import command
from tests.tasks.conftest import picture
from tests.train.conftest import PowerCutError, cut_at, logged, losses, tiny_recipe

CLASSES = "[text:text] -> [label:label]"


def reviews(file: Path, good: str = "好") -> Path:
    rows = [{"text": f"第{n}条", "label": good if n % 2 else "差"} for n in range(40)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    data = changes.pop("data", None) or [{"source": str(reviews(folder / "a.jsonl")), "task": CLASSES}]
    return tiny_recipe(folder / "run", data=data, **changes)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe_of(tmp_path_factory.mktemp("base")))


def test_corrected_labels_are_no_data_to_go_on_with(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    train(recipe)
    before = files(tmp_path / "run")
    reviews(tmp_path / "a.jsonl", good="妙")
    with pytest.raises(UsageError, match=r"cannot be resumed: data.0.source \(.*a.jsonl\) has another content.*delete"):
        train(recipe)
    recipe.train.steps = 9
    with pytest.raises(UsageError, match="has another content than before"):
        train(recipe)
    assert files(tmp_path / "run") == before


def test_an_output_takes_one_training_at_a_time(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with lock_output(recipe.output), pytest.raises(UsageError, match="run is being written by another process"):
        train(recipe)
    assert not recipe.output.exists() and train(recipe).is_dir()


def test_a_picture_that_was_exchanged_is_other_data(tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_bytes(picture(16, 16, seed=1))
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "p.jpg", "caption": "图"}) + "\n", "utf-8")
    recipe = recipe_of(tmp_path, data=[{"source": str(tmp_path / "d.jsonl"), "task": "caption"}], steps=1)
    train(recipe)
    assert check_resumption(recipe).finished
    (tmp_path / "p.jpg").write_bytes(picture(16, 16, seed=2))
    with pytest.raises(UsageError, match="data.0.source .* has another content"):
        train(recipe)


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path)
    model = train(recipe)
    before = files(tmp_path / "run")
    capsys.readouterr()
    recipe.train.keep = 3
    assert train(recipe) == model
    said = capsys.readouterr().err
    assert "This run is finished (6 steps): nothing was trained. For more steps: train.steps=N, above 6;" in said
    assert f"delete {tmp_path / 'run'}" in said and "changes" not in said
    recipe.train.learning_rate = 0.5
    train(recipe)
    said = capsys.readouterr().err
    assert "These changes had no effect: train.learning_rate was 0.001 and is 0.5." in said
    assert files(tmp_path / "run") == before
    recipe.train.steps = 8
    train(recipe)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7, 8]
    said = capsys.readouterr().err
    assert (
        "The steps to come use what changed since the last checkpoint: train.learning_rate was 0.001 and is 0.5."
        in said
    )
    assert load_recipe(model / "recipe.yaml").train.steps == 8


def test_a_run_that_was_cut_off_before_its_model_is_not_finished(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    train(recipe)
    (tmp_path / "run/model/config.json").write_text("{}", "utf-8")
    log = tmp_path / "run/metrics.jsonl"
    log.write_text(log.read_text("utf-8")[:-30], "utf-8")
    train(recipe)
    assert json.loads((tmp_path / "run/model/config.json").read_text("utf-8"))["hidden_size"] == 32


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, steps=1)
    train(recipe)
    (tmp_path / "run/checkpoints/step-00000001/state.json").write_text('{"data": ', "utf-8")
    with pytest.raises(OpenM6Error, match="step-00000001 is damaged; delete it"):
        train(recipe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"data.0.columns": {"text": "label"}}, "data.0.columns.text was not given and is label"),
        ({"data.0.noise": 0.5}, "data.0.noise was 0.0 and is 0.5"),
        ({"model.sizes.num_hidden_layers": 3}, "model.sizes.num_hidden_layers was 2 and is 3"),
        ({"data.0.task": "[text:text]? -> [label:label]"}, r"data.0.task \(.*\) has another content"),
        ({"tokenizer.vocab_size": 900, "seed": 4}, "seed was 0 and is 4; tokenizer.vocab_size was 800 and is 900"),
        ({"train.optimizer": "muon"}, "train.optimizer was adamw and is muon"),
        ({"train.freeze_image_encoder": True}, "train.freeze_image_encoder was False and is True"),
        ({"adapt": {"method": "lora"}, "model": {"path": "base"}}, "adapt.method was not given and is lora"),
    ],
)
def test_what_decides_what_was_learned_may_not_change(
    tmp_path: Path, base: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        check_resumption(changed(tmp_path, base, changes))


def test_what_does_not_may(tmp_path: Path, base: Path) -> None:
    free = {"train.keep": 1, "train.log_every": 2, "train.steps": 9, "name": "other", "parallel": {"sharding": "zero2"}}
    assert check_resumption(changed(tmp_path, base, free)).warnings == []
    found = check_resumption(changed(tmp_path, base, {"train.label_smoothing": 0.1, "train.batch_size": 4}))
    assert found.warnings == [
        "train.batch_size was 8 and is 4", "train.label_smoothing was 0.0 and is 0.1"
    ] and found.finished  # fmt: skip


def changed(folder: Path, base: Path, changes: dict[str, Any]) -> Recipe:
    """The recipe of the base's run, with changes at places such as train.steps."""
    from openm6.train.recipe import override_recipe

    values = load_recipe(base / "recipe.yaml").model_dump(mode="json", exclude_unset=True)
    for place, value in changes.items():
        inner: Any = values
        *parts, last = place.split(".")
        for part in parts:
            inner = inner[int(part) if part.isdigit() else part]
        inner[last] = {"path": str(base)} if value == {"path": "base"} else value
    if "adapt" in values:
        del values["tokenizer"]
    return override_recipe(values)  # type: ignore[return-value]


def test_a_model_to_start_from_counts_by_its_weights(tmp_path: Path, base: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    for name, content in files(base).items():
        (start / name).write_bytes(content)
    recipe = recipe_of(tmp_path, model={"path": str(start)}, steps=1)
    train(recipe)
    moved = start.rename(tmp_path / "moved")
    recipe.model.path = moved
    assert check_resumption(recipe).finished
    weights = (moved / "model.safetensors").read_bytes()
    (moved / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\1")
    with pytest.raises(UsageError, match=r"model.path \(.*moved\) has another content"):
        train(recipe)


def test_a_refused_training_leaves_no_folder(tmp_path: Path, base: Path) -> None:
    given = ("--data", reviews(tmp_path / "a.jsonl"), "--output", tmp_path / "new", "train.workers=0")
    for words in (("--task", "vqa", *given), ("--task", CLASSES, *given, "train.batch_size=0"),
                  ("--task", CLASSES, *given, "train.country=XYZ")):  # fmt: skip
        with pytest.raises(UsageError):
            command("finetune", base, *words)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"preset": "demo", "sizes": {"vocab_size": 5}}}, "follows from the tokenizer"),
        ({"vectors": {"dims": [9999]}}, "vectors.dims has 9999"),
        ({"evaluation": {"data": [{"source": "DATA", "task": "nope"}]}}, 'no task "nope"'),
        ({"evaluation": {"data": [{"source": "DATA", "task": "vqa"}]}}, "image"),
        ({"evaluation": {"data": [{"source": "DATA", "task": "[text:text] -> [text:label]"}]}}, "has no metrics"),
        ({"evaluation": {"data": [{"source": "DATA", "task": "text_vector"}]}}, "gives a vector"),
    ],
)
def test_what_is_refused_before_the_first_step_leaves_no_folder(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    data = reviews(tmp_path / "a.jsonl")
    recipe = recipe_of(tmp_path, **json.loads(json.dumps(changes).replace("DATA", str(data))))
    with pytest.raises(OpenM6Error, match=said):
        train(recipe)
    assert list(tmp_path.iterdir()) == [data]


def test_finetuning_again_with_the_same_command_does_nothing(tmp_path: Path, base: Path) -> None:
    words = ("--task", CLASSES, "--data", reviews(tmp_path / "a.jsonl"), "--output", tmp_path / "run", "--steps", 2)
    assert command("finetune", base, *words, "train.workers=0").exit_code == 0
    before = files(tmp_path / "run")
    again = command("finetune", base, *words, "train.workers=0", "train.keep=1")
    assert again.exit_code == 0 and "nothing was trained" in again.output
    with pytest.raises(UsageError, match="adapt.method was not given"):
        command("finetune", base, *words, "--method", "lora", "train.workers=0")
    assert files(tmp_path / "run") == before


def test_the_recipe_lies_in_the_model(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, steps=1)
    model = train(recipe)
    assert load_recipe(model / "recipe.yaml") == load_recipe(tmp_path / "run/recipe.yaml") == recipe


def test_energy_is_that_of_all_pieces(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(PowerCutError):
        train(recipe, cut_at(5))
    state = tmp_path / "run/checkpoints/step-00000003/state.json"
    content = json.loads(state.read_text("utf-8"))
    assert content["energy"]["kwh"] > 0
    content["energy"] = {"kwh": 100.0, "co2e_kg": 50.0, "measured": 0.5}
    state.write_text(json.dumps(content), "utf-8")
    train(recipe)
    last = logged(tmp_path / "run")[-1]
    assert 100 < last["energy_kwh"] < 101 and 50 < last["co2e_kg"] < 51
    assert last["energy_measured"] == pytest.approx(0.5, abs=0.01)


def test_a_tokenizer_is_made_anew_until_something_depends_on_it(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(PowerCutError):
        train(recipe, cut_at(1))
    first = (tmp_path / "run/tokenizer/tokenizer.json").read_text("utf-8")
    assert "妙" not in first
    recipe.tokenizer.characters = 0
    reviews(tmp_path / "a.jsonl", good="妙")
    train(recipe)
    assert "妙" in (tmp_path / "run/tokenizer/tokenizer.json").read_text("utf-8")


def test_a_teachers_answers_are_to_these_records_of_this_teacher(tmp_path: Path, base: Path) -> None:
    alone, folder = Group(0, 1, torch.device("cpu")), tmp_path / "run/answers"
    recipe = recipe_of(tmp_path)
    for good, count in (("好", 1), ("好", 1), ("妙", 2)):
        reviews(tmp_path / "a.jsonl", good=good)
        teacher_answers(open_section(recipe.data[0]), get(CLASSES), {}, base, tmp_path / "run", alone)
        assert len(list(folder.iterdir())) == count


def test_a_chain_of_other_data_is_another_chain(tmp_path: Path, base: Path) -> None:
    data = str(reviews(tmp_path / "a.jsonl"))
    task = {"task": CLASSES, "data": data, "validation": data}
    chain = check_chain({"model": str(base), "output": str(tmp_path / "small"), "tasks": [task]})
    for _ in range(2):
        _Work(chain, print)
    reviews(tmp_path / "a.jsonl", good="妙")
    with pytest.raises(UsageError, match="of another model or other data"):
        _Work(chain, print)

"""The loop: what it learns, that it can be interrupted anywhere, and what it does with trouble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.core.energy import carbon_intensity
from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.train.distributed import process_group
from openm6.train.trainer import DIVERGED, Trainer, train
from tests.tasks.conftest import picture
from tests.train.conftest import SIZES, PowerCutError, cut_at, logged, losses, tiny_recipe


@pytest.mark.slow
def test_the_loss_falls_and_a_usable_model_is_left(tmp_path: Path) -> None:
    model = train(tiny_recipe(tmp_path, steps=40, learning_rate=1e-2, checkpoint_every=40))
    first, last = losses(tmp_path)[1], losses(tmp_path)[40]
    assert last < 0.6 * first
    m6 = Session.load(model)
    assert set(m6.tasks) == {"vqa", "masked_captioning"}
    assert isinstance(m6.run("vqa", photo=picture(), question="这是什么？"), str)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_recipe(tmp_path / name, seed=seed, steps=2))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "cuts"), [("adamw", (2, 4)), ("muon", (4, 5))])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str, cuts: tuple[int, ...]) -> None:
    whole = tmp_path / "whole"
    train(tiny_recipe(whole, optimizer=optimizer))
    for cut in cuts:
        broken = tmp_path / str(cut)
        with pytest.raises(PowerCutError):
            train(tiny_recipe(broken, optimizer=optimizer), on_step=cut_at(cut))
        with (broken / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write('{"step": 3, "lo')  # killed as it wrote
        train(tiny_recipe(broken, optimizer=optimizer))
        assert losses(broken) == losses(whole)
        ours, theirs = (Session.load(p / "model", trainable=True).model.state_dict() for p in (whole, broken))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_packing_and_accumulation_change_no_loss(tmp_path: Path) -> None:
    variants: dict[str, dict[str, Any]] = {
        "packed": {}, "padded": {"packing": False}, "in parts": {"accumulate": 4}, "in threads": {"workers": 2},
    }  # fmt: skip
    for name, changes in variants.items():
        train(tiny_recipe(tmp_path / name, steps=4, **changes))
    expected = losses(tmp_path / "packed")
    for name in variants:
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name


def test_losses_come_by_task_and_by_source(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, steps=2))
    line = logged(tmp_path)[0]
    assert set(line["loss_by_task"]) == {"vqa", "masked_captioning"}
    assert set(line["loss_by_source"]) == {"questions", "captions"}
    assert line["energy_kwh"] >= 0
    assert line["tokens_per_second"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_no_number_stops_the_run_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, steps=3))
    with process_group() as group:
        trainer = Trainer(tiny_recipe(tmp_path, steps=6), group)
        trainer._resume()
        with torch.no_grad():
            trainer.model.embed.weight.fill_(float("nan"))
        with pytest.raises(OpenM6Error, match=r"diverged at step 3: the gradient is not finite.*step-00000003"):
            trainer._one_step(next(iter(trainer.loader)))


def test_a_learning_rate_that_is_far_too_high_is_told(tmp_path: Path) -> None:
    with pytest.raises(OpenM6Error, match="Try a lower train.learning_rate"):
        train(tiny_recipe(tmp_path, steps=60, learning_rate=30.0, warmup=0, schedule="constant"))


@pytest.mark.slow
def test_a_source_that_joins_late_may_raise_the_loss(tmp_path: Path) -> None:
    data = [
        {"source": "digits/train", "task": "vqa"},
        {"source": "demo:catalogue/train?pictures=30", "task": "caption", "weight": 50.0, "start": 25},
    ]
    train(tiny_recipe(tmp_path, data=data, steps=30, learning_rate=1e-2))
    assert losses(tmp_path)[26] > losses(tmp_path)[25] + DIVERGED


def test_bad_records_are_written_down_and_passed_over(tmp_path: Path) -> None:
    data = _photos(tmp_path, good=40, broken=1)
    train(tiny_recipe(tmp_path / "run", data=[{"source": str(data), "task": "caption"}], steps=12))
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert len(rejects) == 1
    assert rejects[0]["where"] == f"{data}:41"
    assert "truncated or damaged" in rejects[0]["reason"]


@pytest.mark.slow
def test_the_end_of_a_run_tells_what_was_cut_and_what_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _photos(tmp_path, good=40, broken=2)
    with data.open("a", encoding="utf-8") as file:
        file.writelines("\n" + json.dumps({"image": f"{n}.jpg", "caption": "很长的文字" * 100}) for n in range(20))
    recipe = tiny_recipe(tmp_path / "run", data=[{"source": str(data), "task": "caption"}], steps=16)
    with pytest.raises(PowerCutError):
        train(recipe, cut_at(8))
    train(recipe)  # counts of an interrupted run go on
    last = logged(tmp_path / "run")[-1]
    assert last["examples"] == 128 and 30 < last["cut"] < 55 and last["skipped_records"] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{last['cut']} of 128 examples were longer than the model takes" in said
    assert said.rindex("2 records could not be used") > said.rindex("Trained 16 steps")


def test_too_many_bad_records_stop_the_run(tmp_path: Path) -> None:
    data = _photos(tmp_path, good=30, broken=30)
    recipe = tiny_recipe(tmp_path / "run", data=[{"source": str(data), "task": "caption"}], steps=50)
    with pytest.raises(DataError, match=r"records .*could not be used .*truncated or damaged.*at most 5% may be"):
        train(recipe)


def test_training_measures_on_the_way(tmp_path: Path) -> None:
    evaluation = {"every": 2, "limit": 8, "data": [{"source": "demo:questions/test?pictures=5", "task": "vqa"}]}
    train(tiny_recipe(tmp_path, steps=4, evaluation=evaluation))
    measured = [line for line in logged(tmp_path) if "evaluation" in line]
    assert [line["step"] for line in measured] == [2, 4]
    assert all(0 <= line["accuracy"] <= 1 for line in measured)


def test_a_finished_model_can_be_trained_on_with_another_task(tmp_path: Path) -> None:
    first = train(tiny_recipe(tmp_path / "first"))
    data = [
        {"source": "demo:items/train?pictures=30", "task": "image_classification", "columns": {"label": "category"}}
    ]
    second = train(tiny_recipe(tmp_path / "second", model={"path": first}, data=data))
    m6 = Session.load(second)
    assert set(m6.tasks) == {"vqa", "masked_captioning", "image_classification"}
    labels = m6.tasks["image_classification"].labels["label"]
    assert 1 < len(labels) <= 8
    assert m6.run("image_classification", photo=picture()) in labels


def test_a_slot_that_may_be_left_out_needs_no_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,label\n一,好\n二,差\n", "utf-8")
    data = [{"source": str(tmp_path / "a.csv"), "task": "[text:hint|drop=0.5] [text:a] -> [label:label]"}]
    assert train(tiny_recipe(tmp_path / "run", data=data, steps=1)).is_dir()


@pytest.mark.slow
def test_learned_positions_end_where_they_end(tmp_path: Path) -> None:
    model: dict[str, Any] = {
        "preset": "demo", "sizes": {**SIZES, "positions": "learned", "max_position_embeddings": 64},
    }  # fmt: skip
    with pytest.raises(UsageError, match="max_length is 65; the model has 64 positions"):
        train(tiny_recipe(tmp_path, model={**model, "max_length": 65}))
    made = train(tiny_recipe(tmp_path, model=model, steps=3))
    assert Session.load(made).processor.max_length == 64  # rows are of 96
    with pytest.raises(UsageError, match="max_length is 65; the model has 64 positions"):
        train(tiny_recipe(tmp_path / "on", model={"path": str(made), "max_length": 65}))


def test_another_shape_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    train(recipe)
    recipe.model.sizes["intermediate_size"] = 64
    with pytest.raises(UsageError, match=r"cannot be resumed: model.sizes.intermediate_size was 48 and is 64. Choose"):
        train(recipe)


def _photos(folder: Path, good: int, broken: int) -> Path:
    lines = []
    for number in range(good + broken):
        content = picture(16, 16, seed=number)
        (folder / f"{number}.jpg").write_bytes(content if number < good else content[: len(content) // 2])
        lines.append(json.dumps({"image": f"{number}.jpg", "caption": f"图 {number}"}))
    (folder / "data.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "data.jsonl"


@pytest.mark.slow
def test_energy_is_told_with_what_is_known_of_it(tmp_path: Path) -> None:
    told = {}
    for country in ("CHN", "FRA"):
        train(tiny_recipe(tmp_path / country, country=country, steps=2))
        told[country] = logged(tmp_path / country)[-1]
    for line in told.values():
        assert line["finished"]
        assert line["energy_kwh"] > 0
        assert 0 <= line["energy_measured"] <= 1
    intensity = {c: line["co2e_kg"] / line["energy_kwh"] for c, line in told.items()}
    assert intensity["CHN"] == pytest.approx(carbon_intensity("CHN"), rel=0.02)
    assert intensity["FRA"] == pytest.approx(carbon_intensity("FRA"), rel=0.02)
    assert intensity["CHN"] > 5 * intensity["FRA"]
    with pytest.raises(UsageError, match='There is no country "XYZ"'):
        train(tiny_recipe(tmp_path / "nowhere", country="XYZ"))


@pytest.mark.slow
def test_pictures_that_are_frozen_have_no_gradients(tmp_path: Path) -> None:
    """None are summed up in the norm that the others are clipped by; what is left is a whole model."""
    base = train(tiny_recipe(tmp_path / "base", steps=1))
    model = {"path": str(base)}
    recipe = tiny_recipe(tmp_path / "run", model=model, freeze_image_encoder=True, clip=0.1, learning_rate=1e-2)

    def look(line: dict[str, Any]) -> None:
        assert not [n for n, p in trainer.model.named_parameters() if p.grad is not None]

    with process_group() as group:
        trainer = Trainer(recipe, group, look)
        trainer.run()
    start, trained = (Session.load(p, trainable=True).model.state_dict() for p in (base, recipe.output / "model"))
    assert start.keys() == trained.keys()
    for name, weight in start.items():
        assert torch.equal(weight, trained[name]) == name.startswith("image."), name
    again = recipe.model_copy(update={"output": tmp_path / "cut"})
    with pytest.raises(PowerCutError):
        train(again, cut_at(4))
    resumed = Session.load(train(again), trainable=True).model.state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in trained.items())


def test_more_parts_than_examples(tmp_path: Path) -> None:
    for name, accumulate in (("two", 2), ("five", 5)):
        train(tiny_recipe(tmp_path / name, steps=2, batch_size=2, accumulate=accumulate, packing=False))
    assert losses(tmp_path / "five") == losses(tmp_path / "two")

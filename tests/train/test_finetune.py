"""`openm6 finetune`: a recipe from a few words, for every method; and noise in what is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, strategies as st

from openm6.core.errors import UsageError
from openm6.core.sequence import IGNORE
from openm6.data.loader import Entry, Loader
from openm6.data.store import ListRecords
from openm6.inference.session import Session
from openm6.tasks.corrupt import noised
from openm6.tasks.task import Task
from openm6.train.finetune import RATES, finetune_recipe
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from tests.conftest import command
from tests.train.conftest import tiny_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe(tmp_path_factory.mktemp("base")))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": f"第{n}条:很{word}", "label": word}) for n in range(20) for word in ("好", "差")]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines), "utf-8")
    return tmp_path / "reviews.jsonl"


def finetune(*words: object) -> str:
    result = command("finetune", *words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_model_learns_a_task_from_a_file_and_stops_by_itself(base: Path, reviews: Path, tmp_path: Path) -> None:
    words = ("--task", "text_classification", "--data", reviews, "--validation", reviews, "--output", tmp_path / "run")
    told = finetune(
        base, *words, "--steps", 4, "--noise", 0.1, "--label-smoothing", 0.1, "train.workers=0", "--teacher", base
    )
    assert "Warning: 40 of the 40 records" in " ".join(told.split())  # it is measured on what it learns
    model = tmp_path / "run" / "model"
    assert str(model) in told.replace("\n", "")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text("utf-8"))
    assert recipe["train"]["label_smoothing"] == 0.1 and recipe["data"][0]["noise"] == 0.1
    assert recipe["distill"]["teacher"] == str(base)
    assert recipe["evaluation"]["patience"] == 3 and recipe["train"]["row_length"] == 96
    session = Session.load(model)
    assert session.run("text_classification", text="很好") in ("好", "差")


@pytest.mark.slow
def test_spellings_of_a_label_are_one_class_and_classes_are_told_before_training(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"第{n}条", "label": "正面 "[: 3 - n % 2]}) + "\n" for n in range(8)))
    words = ("--task", "text_classification", "--data", file, "--output", tmp_path / "run", "--steps", 1)
    told = finetune(base, *words, "train.workers=0")
    assert "label has 1 class: 正面 8." in told.replace("\n", " ")
    assert Session.load(tmp_path / "run" / "model").tasks["text_classification"].labels == {"label": ("正面",)}


@pytest.mark.parametrize("method", RATES)
def test_every_method_has_a_recipe(base: Path, method: str) -> None:
    recipe = check_recipe(finetune_recipe(base, "vqa", ["demo:questions/train"], method))
    assert (recipe.adapt is None) == (method == "full") and recipe.name == f"vqa {method}"
    assert recipe.adapt is None or recipe.adapt.method == method


def test_what_reading_is_told_is_in_the_recipe(base: Path) -> None:
    values = finetune_recipe(base, "vqa", ["a.csv"], data_format="?encoding=big5", images="photos", validation="b.csv")
    for section in (values["data"][0], values["evaluation"]["data"][0]):
        assert (section["format"], section["images"]) == ("?encoding=big5", "photos")


@pytest.mark.slow
def test_an_adapter_and_changes_of_the_recipe(base: Path, reviews: Path, tmp_path: Path) -> None:
    words = (
        "--task",
        "[text:text] -> [label:label]",
        "--data",
        reviews,
        "--method",
        "lora",
        "--output",
        tmp_path / "a",
    )
    finetune(base, *words, "--steps", 2, "adapt.rank=3", "train.workers=0")
    config = json.loads((tmp_path / "a" / "model" / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == 3
    # Data are checked for an adapter as for a model: by its length, and the labels that it has learned.
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "很好", "label": "好"}\n{"text": "很好", "label": "中"}\n', "utf-8")
    checked = command("data", "check", other, "--task", words[1], "--model", tmp_path / "a" / "model", "--json")
    found = json.loads(checked.stdout)
    assert checked.exit_code == 1 and (found["good"], found["max_length"]) == (1, 96)
    assert "'中', none of the task's labels: 好, 差" in found["problems"][0]["reason"]


def test_what_cannot_be_is_told(base: Path, reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no method lore. Did you mean "lora"'):
        finetune(base, "--task", "vqa", "--data", reviews, "--method", "lore")
    with pytest.raises(UsageError, match="no OpenM6 model"):
        finetune(tmp_path, "--task", "vqa", "--data", reviews)
    with pytest.raises(UsageError, match="needs photo"):
        finetune(base, "--task", "vqa", "--data", reviews, "--output", tmp_path / "b")


@given(st.text(min_size=1, max_size=60), st.floats(0, 0.9), st.integers(0, 99))
def test_noise_leaves_out_or_exchanges_characters(text: str, share: float, seed: int) -> None:
    found = noised(text, share, np.random.default_rng(seed))
    assert 0 < len(found) <= len(text) and set(found) <= set(text)
    assert share > 0 or found == text


@pytest.mark.slow
def test_so_many_characters_are_spoilt() -> None:
    text = "".join(chr(0x4E00 + n) for n in range(4000))
    found = noised(text, 0.2, np.random.default_rng(0))
    assert 0.88 < len(found) / 4000 < 0.92
    kept = sum(a == b for a, b in zip(found, [c for c in text if c in set(found)], strict=False))
    assert kept < 4000


def test_noise_spoils_what_is_given_and_not_what_is_asked_for(base: Path) -> None:
    processor = Session.load(base, "meta", trainable=True).processor
    records = ListRecords([{"text": "红黄蓝绿" * 6, "label": "一二三四五六"}] * 4)
    task = Task.from_instruction("[text:text] -> [text:label]")
    plain, spoilt = (
        next(iter(Loader([Entry("r", records, task, noise=noise)], processor, 4, threads=0))) for noise in (0.0, 0.3)
    )
    assert all(len(a.ids) > len(b.ids) for a, b in zip(plain, spoilt, strict=True))
    for a, b in zip(plain, spoilt, strict=True):
        assert a.labels[a.labels != IGNORE].tolist() == b.labels[b.labels != IGNORE].tolist()

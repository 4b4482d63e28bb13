"""Recipes: what is wrong is named with its key, its value and what is allowed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import UsageError
from openm6.train.optimizer import rate_at
from openm6.train.recipe import ParallelSection, TrainSection, check_recipe, find_recipe, load_recipe
from tests.train.conftest import tiny_recipe

GOOD = """
name: goods
output: out
model: {preset: demo}
data: [{source: goods.jsonl, task: caption}]
train: {steps: 10}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "goods.yaml"
    path.write_text(text, "utf-8")
    return path


def test_overrides_are_read_as_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD), ["train.learning_rate=3e-4", "train.steps=5", "seed=7"])
    assert (recipe.train.learning_rate, recipe.train.steps, recipe.seed) == (3e-4, 5, 7)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stpes=5", r"unknown key train.stpes. Did you mean \"steps\"\? Known here: steps, batch_size"),
        ("train.steps=many", r"train.steps is 'many': input should be a valid integer"),
        ("train.steps=0", r"train.steps is 0: input should be greater than or equal to 1"),
        ("train.schedule=linear", r"train.schedule is 'linear': input should be 'cosine', 'wsd' or 'constant'"),
        ("model.path=somewhere", r"model is .*: give either preset or path"),
        ("data=[]", r"data is \[\]: list should have at least 1 item"),
        ("nonsense", r"\"nonsense\" is no override; write key=value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe(written(tmp_path, GOOD), [override])


def test_an_unknown_key_deep_in_a_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"goods.yaml: unknown key data.0.wieght. Did you mean \"weight\""):
        load_recipe(written(tmp_path, GOOD.replace("task: caption", "task: caption, wieght: 2")))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="goods.yaml: the key train is missing"):
        load_recipe(written(tmp_path, GOOD.replace("train: {steps: 10}\n", "")))


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10", "stpes: 10, clip: 0").replace("task: caption", "weight: -1")
    with pytest.raises(UsageError) as error:
        load_recipe(written(tmp_path, text), ["seed=x"])
    first, *lines = str(error.value).splitlines()
    assert first == f"{tmp_path / 'goods.yaml'}: 6 problems:"
    told = (
        "seed is 'x': input should be a valid integer", "data.0.weight is -1: input should be greater than 0",
        "the key data.0.task is missing.", "the key train.steps is missing.", "train.clip is 0: input should be",
        'unknown key train.stpes. Did you mean "steps"? Known here:',
    )  # fmt: skip
    assert len(lines) == 6 and all(any(line.startswith(f"  {start}") for line in lines) for start in told)


def test_a_recipe_is_called_like_its_file_unless_it_has_a_name(tmp_path: Path) -> None:
    bare = written(tmp_path, GOOD.replace("name: goods\noutput: out\n", ""))
    found = load_recipe(bare)
    assert (found.name, found.output) == ("goods", Path("runs/goods"))
    assert load_recipe(bare, ["name=other"]).output == Path("runs/other")
    assert load_recipe(bare, ["output=here"]).output == Path("here")
    assert load_recipe(written(tmp_path, GOOD)).output == Path("out")


def test_broken_yaml_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="goods.yaml is not valid YAML"):
        load_recipe(written(tmp_path, "name: [a"))


def test_recipes_that_come_along_are_found_by_name() -> None:
    assert find_recipe("demo") == find_recipe("recipes/demo.yaml")
    assert load_recipe("demo").train.steps > 0
    with pytest.raises(UsageError, match=r"There is no recipe demmo. Did you mean \"demo\""):
        find_recipe("demmo")


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(1, 400), st.integers(0, 100), st.floats(0, 1))
def test_the_learning_rate_rises_then_never_rises_again(schedule: str, steps: int, warmup: int, decay: float) -> None:
    settings = TrainSection(steps=steps, warmup=warmup, decay=decay, schedule=schedule, final_rate=0.1)  # type: ignore[arg-type]
    rates = [rate_at(step, settings) for step in range(steps)]
    top = min(warmup, steps)
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    assert max(rates) <= 1 + 1e-9
    assert all(rate >= 0.1 * (1 - 1e-9) for rate in rates[top:])


@pytest.mark.parametrize("shares", [0.5, {"parameters": 0.5, "gradients": 0.5, "optimizer": 0.5}])
def test_one_number_offloads_all_states(shares: Any) -> None:
    offload = ParallelSection.model_validate({"offload": shares}).offload
    assert (offload.parameters, offload.gradients, offload.optimizer) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (1.5, "parallel.offload.parameters is 1.5: input should be less than or equal to 1"),
        ({"optimizer": -0.1}, "parallel.offload.optimizer is -0.1"),
        ({"parameters": 0.5, "optimizer": 1.0}, "whose parameters are on the host is updated there"),
        ({"moments": 1.0}, "unknown key parallel.offload.moments. Known here: parameters, gradients, optimizer"),
    ],
)
def test_an_offload_that_cannot_be_is_refused(tmp_path: Path, shares: Any, message: str) -> None:
    values = tiny_recipe(tmp_path).model_dump(mode="json", exclude_unset=True)
    with pytest.raises(UsageError, match=message):
        check_recipe({**values, "parallel": {"sharding": "zero3", "offload": shares}})


def test_an_override_may_change_one_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: a\noutput: o\nmodel: {preset: demo}\ntrain: {steps: 3}\n"
        "data: [{source: one, task: caption}, {source: two, task: vqa, weight: 2}]\n",
        "utf-8",
    )
    found = load_recipe(tmp_path / "a.yaml", ["data.1.source=three", "train.steps=5", "data.0.columns={photo: p}"])
    assert [d.source for d in found.data] == ["one", "three"] and found.data[1].weight == 2  # type: ignore[union-attr]
    assert found.train.steps == 5 and found.data[0].columns == {"photo": "p"}
    with pytest.raises(UsageError, match=r"a.yaml has no place data.7.source"):
        load_recipe(tmp_path / "a.yaml", ["data.7.source=x"])

"""What docs/retrieval.md shows, run line by line with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from tests.tasks.conftest import picture
from tests.train.conftest import SIZES, tiny_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "retrieval.md").read_text("utf-8")
TINY = {"steps": 2, "batch_size": 8, "row_length": 96, "checkpoint_every": 2, "precision": "fp32", "workers": 0}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def goods(file: Path, numbers: range) -> None:
    rows = []
    for n in numbers:
        file.with_name(f"{n}.jpg").write_bytes(picture(seed=n))
        colour = ("红色", "蓝色")[n % 2]
        rows.append(
            {"image": f"{n}.jpg", "sku": f"A{n}", "title": f"{colour}的裙子{n}", "price": 50 + n / 2, "colour": colour}
        )
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.mark.slow
def test_the_recipe_and_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    goods(tmp_path / "goods.jsonl", range(70))
    goods(tmp_path / "test.jsonl", range(70, 80))
    goods(tmp_path / "new.jsonl", range(75, 82))
    (tmp_path / "a.jpg").write_bytes(picture(seed=3))
    sizes = {**SIZES, "hidden_size": 128}
    train(
        tiny_recipe(tmp_path / "runs" / "demo", steps=1, checkpoint_every=1, model={"preset": "demo", "sizes": sizes})
    )
    [recipe] = blocks("yaml")
    values = yaml.safe_load(recipe)
    trained = train(check_recipe({**values, "train": {**values["train"], **TINY}}))
    assert trained.resolve() == (tmp_path / "runs" / "goods" / "model").resolve()
    ran = 0
    for block in blocks("bash"):
        for line in block.splitlines():
            line = line.replace("runs/vectors", "runs/goods").replace(
                "shop:visits/train", "shop:visits/train?records=60"
            )
            done = CliRunner().invoke(commands(), shlex.split(line, comments=True)[1:])
            assert done.exit_code == 0, (line, done.output, done.exception)
            ran += 1
    assert ran > 10

"""AdamW with moments of 8 bits, by torchao, which is installed beside the rest for this test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openm6.train.trainer import train
from tests.train.conftest import SIZES, losses, tiny_recipe

BESIDE = Path(sys.prefix) / "lowbit"
TRAINING = """
import sys
from openm6.train.recipe import load_recipe
from openm6.train.trainer import train

for steps in (6, 12):
    train(load_recipe(sys.argv[1], [f"train.steps={steps}"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not BESIDE.is_dir(), reason="torchao is not installed beside the rest; `make` does it")
def test_eight_bits_train_like_thirty_two_and_go_on_after_a_stop(tmp_path: Path) -> None:
    model = {
        "preset": "demo",
        "sizes": {**SIZES, "hidden_size": 64, "intermediate_size": 128},
    }  # large enough for blocks
    exact = tiny_recipe(tmp_path / "exact", model=model, steps=12, schedule="constant")
    train(exact)
    values = {**exact.model_dump(mode="json", exclude_unset=True), "output": str(tmp_path / "low")}
    values["train"]["optimizer"] = "adam8bit"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(recipe)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(BESIDE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resuming from step 6" in done.stderr
    low, full = losses(tmp_path / "low"), losses(tmp_path / "exact")
    assert max(low) == 12
    assert low[1] == pytest.approx(full[1], rel=1e-5)
    assert low[12] < 0.9 * low[1]
    assert all(low[s] == pytest.approx(full[s], rel=0.05) for s in low)


@pytest.mark.slow
@pytest.mark.skipif(not BESIDE.is_dir(), reason="torchao is not installed beside the rest; `make` does it")
def test_their_planned_bytes_are_those_that_they_take() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/plan/test_footprint.py"]
    done = subprocess.run(
        [*command, "-k", "adam8bit"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(BESIDE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout
    assert "skipped" not in done.stdout

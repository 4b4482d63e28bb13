"""The same recipe on Ray: two workers give the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.train.trainer import train
from tests.processes import run_openm6
from tests.train.conftest import losses, recipe_file, tiny_recipe


@pytest.mark.slow
def test_two_workers_equal_one_process(tmp_path: Path) -> None:
    alone = tiny_recipe(tmp_path / "alone")
    train(alone)
    recipe = recipe_file(alone, tmp_path)
    output = tmp_path / "ray"
    done = run_openm6("train", recipe, f"output={output}", "--ray-workers", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    assert (output / "model" / "model.safetensors").is_file()

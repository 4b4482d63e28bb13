"""A process that is killed at any step: torchrun starts the round anew, and the run ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.inference.session import Session
from openm6.train.trainer import train
from tests.distributed.test_data_parallel import OPENM6
from tests.train.conftest import SIZES, losses, tiny_recipe

KILLS = int(os.environ.get("OPENM6_KILLS", "2"))
"""Kills in a row; a start takes seconds, so the suite makes few of them."""


def recipe_for(output: Path, **changes: Any) -> dict[str, Any]:
    sizes = {**SIZES, "num_hidden_layers": 4, "num_experts": 4, "experts_per_token": 2}
    recipe = tiny_recipe(
        output, model={"preset": "demo", "sizes": sizes}, steps=8 * KILLS + 8, checkpoint_every=4, **changes
    )
    return recipe.model_dump(mode="json", exclude_unset=True)


def processes_of(parent: int) -> list[int]:
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in children]


@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(tmp_path: Path) -> None:
    alone = recipe_for(tmp_path / "alone")
    alone["pseudo"] = {"steps": 4 * KILLS, "rewarm": 4}
    from openm6.train.recipe import check_recipe

    train(check_recipe(alone))
    together = {**alone, "output": str(tmp_path / "together"), "parallel": {"sharding": "zero3", "experts": 2}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(together), "utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(KILLS + 1), "--monitor-interval", "0.1", "--no-python", str(OPENM6), "train", str(file),
    ]  # fmt: skip
    chance = random.Random(0)
    with (tmp_path / "log.txt").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(KILLS):
                # After some steps of this round, while a checkpoint may be on its way.
                _wait_for_steps(tmp_path / "together", _steps(tmp_path / "together") + chance.randint(1, 6), run, log)
                time.sleep(chance.uniform(0, 0.1))
                os.kill(chance.choice(processes_of(run.pid)), signal.SIGKILL)
            assert run.wait(120) == 0, (tmp_path / "log.txt").read_text()[-3000:]
        finally:
            run.kill()
    found, wanted = losses(tmp_path / "together"), losses(tmp_path / "alone")
    assert found == pytest.approx(wanted, rel=2e-3)
    assert found[max(found)] == pytest.approx(wanted[max(wanted)], rel=1e-3)
    assert Session.load(tmp_path / "together" / "model").model.config.distinct_layers is None
    assert not list((tmp_path / "together" / "checkpoints").glob(".*")), "no drafts are left"


def _steps(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text("utf-8").splitlines()) if file.is_file() else 0


def _wait_for_steps(output: Path, number: int, run: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + 300
    while _steps(output) < number:
        assert run.poll() is None, Path(log.name).read_text()[-3000:]
        assert time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
        time.sleep(0.02)

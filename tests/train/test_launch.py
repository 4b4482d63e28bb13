"""Several processes by one command: who speaks, and what happens when one dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.core.errors import OpenM6Error, UsageError
from openm6.train import launch as launching
from openm6.train.launch import launch
from openm6.train.recipe import load_recipe
from openm6.train.trainer import train
from tests.conftest import command
from tests.train.conftest import losses, recipe_file, tiny_recipe


@pytest.mark.slow
def test_a_failure_of_the_first_process_gives_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch(["tasks", "show", "vqaa"], 2, tmp_path / "logs")
    assert ended.value.code == 2
    assert capfd.readouterr().err.count('Did you mean "vqa"?') == 1
    assert 'Did you mean "vqa"?' in (tmp_path / "logs" / "process-1.log").read_text("utf-8")


@pytest.mark.slow
def test_processes_that_succeed_are_silent_but_the_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch(["--version"], 3, tmp_path / "logs")
    assert len(capfd.readouterr().out.splitlines()) == 1
    assert len(list((tmp_path / "logs").iterdir())) == 2


@pytest.mark.slow
def test_several_processes_go_on_end_and_are_refused_like_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And their losses are those of one."""
    recipe = recipe_file(tiny_recipe(tmp_path / "run", steps=2, checkpoint_every=1), tmp_path)
    for changes, told in (((), "Trained 2 steps"), ((), "This run is finished (2 steps)"),
                          (("train.steps=3",), "Resuming from step 2")):  # fmt: skip
        assert command("train", recipe, *changes, "-p", 2).exit_code == 0
        assert capfd.readouterr().err.count(told) == 1
    assert load_recipe(tmp_path / "run/recipe.yaml").train.steps == 3
    train(tiny_recipe(tmp_path / "alone", steps=2))
    alone, together = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert [together[step] for step in alone] == pytest.approx([*alone.values()], rel=1e-4)
    with pytest.raises(UsageError, match="model.sizes.hidden_size was 32 and is 64"):
        command("train", recipe, f"output={tmp_path / 'run'}", "model.sizes.hidden_size=64", "-p", 2)


@pytest.mark.slow
def test_when_another_process_dies_the_rest_is_ended_and_its_log_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "GRACE", 2.0)
    # A package of the same name that comes first: process 1 gives up, process 0 would wait for it.
    broken = tmp_path / "openm6"
    broken.mkdir()
    (broken / "__init__.py").touch()
    (broken / "__main__.py").write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n    print('no more memory'); sys.exit(3)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenM6Error, match=r"Process 1 of 2 ended with code 3; see .*process-1.log"):
        launch([], 2, tmp_path / "logs")
    assert "no more memory" in (tmp_path / "logs" / "process-1.log").read_text("utf-8")

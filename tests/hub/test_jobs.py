"""Jobs: one after the other, killed, stopped, gone on with, by queues that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from openm6.core.environment import HOME
from openm6.core.errors import UsageError
from openm6.hub.jobs import ATTEMPTS, DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Jobs, begun, last_step, progress
from tests.processes import run_openm6
from tests.train.conftest import losses, recipe_file, tiny_recipe


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return Jobs()


def test_a_log_that_is_being_written_says_its_last_whole_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 2.5}\n{"step": 3, "lo')
    assert last_step(tmp_path) == {"step": 2, "loss": 2.5}
    assert last_step(tmp_path / "nothing") == {}


def until(true: Callable[[], bool], jobs: Jobs | None = None, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        if jobs is not None:
            jobs.step()
        time.sleep(0.05)


def training(tmp_path: Path, steps: int = 6) -> tuple[str, Path]:
    output = tmp_path / "run"
    return str(recipe_file(tiny_recipe(output, steps=steps, checkpoint_every=4), tmp_path / "recipe")), output


def test_they_run_one_after_the_other_and_tell_how_they_ended(jobs: Jobs, tmp_path: Path) -> None:
    first = jobs.submit(["eval", "--help"], folder=tmp_path)
    second = jobs.submit(["train", "no-such-recipe.yaml"], name="mine", folder=tmp_path)
    assert [job.id for job in jobs.list()] == [first.id, second.id] and jobs.get(second.id[:-1]).state == WAITING
    jobs.step()
    assert [job.state for job in jobs.list()].count(RUNNING) == 1
    jobs.work(until_empty=True, seconds=0.05)
    good, bad = jobs.get(first.id), jobs.get(second.id)
    assert (good.state, good.code) == (DONE, 0) and "Usage" in jobs.log(good).read_text("utf-8")
    assert (bad.state, bad.code, bad.name) == (FAILED, 2, "mine") and "no-such-recipe" in bad.message
    assert good.started < good.ended <= bad.ended


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_by_itself(jobs: Jobs, tmp_path: Path) -> None:
    """Its losses are those of a run without an end in the midst."""
    recipe, output = training(tmp_path, 40)
    job = jobs.submit(["train", recipe], folder=tmp_path)
    until(lambda: (output / "metrics.jsonl").is_file() and len(losses(output)) > 8, jobs)
    running = jobs.get(job.id)
    assert progress(running)["steps"] == 40 and 0 < progress(running)["step"] < 40
    os.killpg(running.process, signal.SIGKILL)
    until(lambda: jobs.get(job.id).state == DONE, jobs)
    assert jobs.get(job.id).attempts == 1 and "Resuming from step" in jobs.log(running).read_text("utf-8")
    alone, whole = training(tmp_path / "alone", 40)
    assert run_openm6("train", alone).returncode == 0
    assert losses(output) == losses(whole)


@pytest.mark.slow
def test_a_job_is_stopped_and_gone_on_with(jobs: Jobs, tmp_path: Path) -> None:
    recipe, output = training(tmp_path, 60)
    job = jobs.submit(["train", recipe], folder=tmp_path)
    until(lambda: (output / "metrics.jsonl").is_file() and len(losses(output)) > 4, jobs)
    process = jobs.get(job.id).process
    assert jobs.stop(job.id).state == STOPPED
    assert begun(process) is None
    assert not (output / "model").exists()
    jobs.step()
    assert jobs.get(job.id).state == STOPPED
    jobs.resume(job.id)
    until(lambda: jobs.get(job.id).state == DONE, jobs)
    assert max(losses(output)) == 60 and (output / "model").is_dir()


@pytest.mark.slow
def test_what_runs_goes_on_when_the_queue_ends(jobs: Jobs, tmp_path: Path) -> None:
    recipe, output = training(tmp_path, 40)
    queue = subprocess.Popen([sys.executable, "-m", "openm6", "jobs", "work"])
    job = jobs.submit(["train", recipe], folder=tmp_path)
    until(lambda: jobs.get(job.id).state == RUNNING)
    queue.send_signal(signal.SIGKILL)
    queue.wait()
    until(lambda: jobs.get(job.id).state == DONE)  # no queue has looked after it
    assert max(losses(output)) == 40


@pytest.mark.slow
def test_two_queues_start_nothing_twice(jobs: Jobs, tmp_path: Path) -> None:
    for _ in range(4):
        jobs.submit(["eval", "--help"], folder=tmp_path)
    queues = [
        subprocess.Popen([sys.executable, "-m", "openm6", "jobs", "work", "--until-empty", "--at-once", "2"])
        for _ in range(2)
    ]
    assert [queue.wait(120) for queue in queues] == [0, 0]
    for job in jobs.list():
        assert job.state == DONE and jobs.log(job).read_text("utf-8").count("openm6 eval --help") == 1


def test_who_dies_again_and_again_has_failed(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.submit(["eval", "--help"], folder=tmp_path)
    file = jobs.root / job.id / "job.json"
    for number in range(ATTEMPTS):
        values = json.loads(file.read_text("utf-8"))
        values |= {"state": RUNNING, "process": 2**22 - 1, "begun": 1.0}
        file.write_text(json.dumps(values), "utf-8")
        jobs.step(at_once=0)
        assert jobs.get(job.id).attempts == number + 1
    assert jobs.get(job.id).state == FAILED and "died 3 times" in jobs.get(job.id).message


def test_what_cannot_be_is_told(jobs: Jobs, tmp_path: Path) -> None:
    for words in ([], ["serve", "x"], ["jobs", "work"], ["../train"]):
        with pytest.raises(UsageError, match="is not a command that can be a job"):
            jobs.submit(words)
    for identity in ("", "none", "../x", "*"):
        with pytest.raises(UsageError, match="There is no job"):
            jobs.get(identity)
    job = jobs.submit(["eval", "--help"], folder=tmp_path)
    with pytest.raises(UsageError, match="is waiting: only"):
        jobs.resume(job.id)
    with pytest.raises(UsageError, match="is waiting: stop it"):
        jobs.remove(job.id)
    assert jobs.stop(job.id).state == STOPPED
    with pytest.raises(UsageError, match="is already stopped"):
        jobs.stop(job.id)
    jobs.remove(job.id)
    assert jobs.list() == []
    (jobs.root / "broken").mkdir()
    (jobs.root / "broken" / "job.json").write_text("{", "utf-8")
    assert jobs.list() == []


def test_a_folder_that_is_gone_is_a_reason(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    job = jobs.submit(["eval", "--help"], folder=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    jobs.step()
    assert jobs.get(job.id).state == FAILED and "no longer exists" in jobs.get(job.id).message


def test_how_far_a_training_is(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "a"
    output.mkdir(parents=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump({"train": {"steps": 100}}), "utf-8")
    lines = [{"step": 10 * n, "loss": 1 / n, "seconds_per_step": 0.5} for n in range(1, 5)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"output": "runs/a"}), "utf-8")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"seed": 1}), "utf-8")
    for words in (
        ("train", "recipe.yaml"), ("train", "a.yaml"), ("train", "demo", "output=runs/a"),
        ("finetune", "m", "--output", "runs/a"), ("finetune", "m", "--output=runs/a"),
    ):  # fmt: skip
        found = progress(Job("1", words, str(tmp_path)))
        assert found == {"step": 40, "steps": 100, "loss": 0.25, "seconds_left": 30}
    assert progress(Job("1", ("eval", "m"), str(tmp_path))) == {} == progress(Job("1", ("train", "x"), str(tmp_path)))

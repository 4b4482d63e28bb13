"""The real commands in processes of their own: a newcomer's path, and what they say to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.processes import run_openm6
from tests.tasks.conftest import picture
from tests.train.conftest import SIZES

pytestmark = pytest.mark.slow

OPENM6 = Path(sys.executable).with_name("openm6")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's photos, captions, a recipe, and a model trained from it by the real command."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "photos").mkdir()
    lines = []
    for number in range(24):
        (folder / "photos" / f"{number}.jpg").write_bytes(picture(40, 30, seed=number))
        lines.append({"image": f"photos/{number}.jpg", "text": f"第{number}张图片。"})
    (folder / "goods.json").write_text(json.dumps(lines, ensure_ascii=False), "utf-8")
    recipe = {
        "name": "goods",
        "output": "run",
        "model": {"preset": "demo", "sizes": SIZES},
        "tokenizer": {"vocab_size": 700, "characters": 50, "num_codes": 8},
        "data": [{"source": "goods.json", "task": "caption"}],
        "train": {"steps": 4, "batch_size": 8, "row_length": 96, "warmup": 1, "checkpoint_every": 2, "workers": 0},
    }
    (folder / "goods.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    run(folder, "train", "goods.yaml")
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str) -> str:
    """The program as it is installed."""
    done = subprocess.run(
        [str(OPENM6), *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_openm6(*arguments, folder=folder, environment=environment())


def printed(folder: Path, *arguments: str) -> str:
    done = call(folder, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refused(folder: Path, code: int, *arguments: str) -> str:
    """What a command says to a mistake: one message, no traceback, this exit code."""
    done = call(folder, *arguments)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_a_newcomers_path(room: Path) -> None:
    assert "24 of 24 records can be used for caption" in run(room, "data", "check", "goods.json", "--task", "caption")
    asked = ("--task", "caption", "--data", "goods.json", "--json", "--report", "report")
    scores = json.loads(run(room, "eval", "run/model", *asked))["scores"]
    assert set(scores) == {"bleu", "rouge_l", "cider"}
    assert scores["bleu"]["n"] == 24
    assert "<img" in (room / "report" / "index.html").read_text("utf-8")
    answer = run(room, "run", "run/model", "caption", "photo=photos/1.jpg", "-o", "max_new_tokens=5", "--json")
    assert json.loads(answer)["task"] == "caption"


def test_a_finished_run_has_nothing_more_to_do(room: Path) -> None:
    before = (room / "run" / "metrics.jsonl").read_text("utf-8").count('"loss"')
    printed(room, "train", "goods.yaml")
    assert (room / "run" / "metrics.jsonl").read_text("utf-8").count('"loss"') == before


def test_tasks_are_listed_and_shown(room: Path) -> None:
    listed = printed(room, "tasks")
    assert "vqa" in listed
    assert "[image:photo] [text:question] -> [text:answer]" in listed
    shown = json.loads(printed(room, "tasks", "show", "vqa", "--json"))
    assert shown["schema"]["inputs"]["required"] == ["photo", "question"]
    assert "question" in printed(room, "tasks", "show", "vqa")


def test_help_is_there_for_every_command(room: Path) -> None:
    for command in (
        [],
        ["train"],
        ["eval"],
        ["run"],
        ["demo"],
        ["bench"],
        ["tasks"],
        ["data", "check"],
        ["models", "import"],
    ):
        assert "Usage" in printed(room, *command, "--help")


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["train", "goods.yaml", "train.stpes=4"], 'unknown key train.stpes. Did you mean "steps"?'),
        (2, ["train", "goods.yaml", "train.steps=lots"], "train.steps is 'lots'"),
        (2, ["train", "nowhere.yaml"], "There is no recipe nowhere.yaml."),
        (2, ["run", "run/model", "capton", "photo=photos/1.jpg"], 'no task "capton". Did you mean "caption"?'),
        (2, ["run", "run/model", "caption"], "photo is missing: the task caption takes photo"),
        (1, ["run", "run/model", "caption", "photo=gone.jpg"], "gone.jpg does not exist"),
        (2, ["run", "run/model", "caption", "photo"], '"photo" is not of the form name=value'),
        (2, ["run", "nowhere", "caption", "photo=photos/1.jpg"], "nowhere is no OpenM6 model"),
        (2, ["run", "run/model", "caption", "photo=photos/1.jpg", "-o", "max_new_tokens=a"], "has to be a number"),
        (1, ["eval", "run/model", "--task", "caption", "--data", "gone.json"], "There is no file gone.json"),
        (2, ["eval", "run/model", "--task", "vqa", "--data", "goods.json"], "The task vqa needs question"),
        (2, ["data", "check", "goods.json", "--task", "caption", "-c", "photo=bild"], "the data has no column 'bild'"),
        (2, ["models", "import", "nowhere", "out"], "nowhere"),
        (2, ["tasks", "show", "vqaa"], 'Did you mean "vqa"?'),
        (2, ["bench", "trainstep"], 'Did you mean "train-step"?'),
    ],
)
def test_mistakes_are_told_in_one_sentence(room: Path, code: int, arguments: list[str], said: str) -> None:
    message = refused(room, code, *arguments)
    assert said in message
    assert len(message.splitlines()) <= 2


def test_empty_data_and_bad_lines_are_told(room: Path) -> None:
    (room / "empty.jsonl").write_text("")
    assert "empty.jsonl holds no usable record" in refused(
        room, 1, "train", "goods.yaml", "output=other", "data=[{source: empty.jsonl, task: caption}]"
    )
    (room / "short.tsv").write_text("image\tcaption\nphotos/1.jpg\t一张图片\nphotos/2.jpg\n", "utf-8")
    checked = call(room, "data", "check", "short.tsv", "--task", "caption")
    assert checked.returncode == 1
    assert "1 of 2 records can be used" in checked.stdout
    assert "short.tsv:3" in checked.stdout


def test_a_slot_that_the_task_has_not_is_told(room: Path) -> None:
    message = refused(room, 2, "run", "run/model", "caption", "photo=photos/1.jpg", "phto=photos/1.jpg")
    assert 'The task caption has no slot phto. Did you mean "photo"?' in message


def test_a_kill_in_the_middle_costs_nothing(room: Path) -> None:
    """kill -9 at any moment; the same command goes on, and the losses are those of an undisturbed run."""
    import signal
    import time

    changes = ["output=killed", "train.steps=14", "train.checkpoint_every=2", "train.log_every=1"]
    metrics = room / "killed" / "metrics.jsonl"
    for wanted in (3, 8):
        process = subprocess.Popen(
            [str(OPENM6), "train", "goods.yaml", *changes], cwd=room, env=environment(), stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.is_file() and metrics.read_text("utf-8").count('"loss"') >= wanted:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    printed(room, "train", "goods.yaml", *changes)
    printed(room, "train", "goods.yaml", *[c.replace("killed", "whole") for c in changes])

    def losses(name: str) -> dict[int, float]:
        lines = (room / name / "metrics.jsonl").read_text("utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return {e["step"]: e["loss"] for e in entries if "loss" in e}

    assert losses("killed") == losses("whole")
    assert len(losses("whole")) == 14

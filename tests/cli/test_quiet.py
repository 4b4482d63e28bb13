"""What libraries warn their developers of does not reach users; what concerns users does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openm6.tasks.library import get as get_task
from tests.conftest import drawing_session
from tests.processes import run_openm6

EXTENSION = """
import subprocess, sys, warnings
warnings.warn("soon gone", FutureWarning)
warnings.warn("old way", DeprecationWarning)
warnings.warn("look at your data")
subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('gone in a process', FutureWarning)"])
"""


def call(room: Path, *words: object, **environment: str) -> str:
    """What a command writes to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "openm6", *map(str, words)],
        cwd=room,
        env={**os.environ, "OPENM6_HOME": str(room / "home"), "OPENM6_CACHE": str(room / "cache"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_warnings_of_libraries_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EXTENSION)
    told = call(tmp_path, "--extension", "mine.py", "tasks")
    assert "look at your data" in told
    assert "soon gone" not in told and "old way" not in told and "gone in a process" not in told
    told = call(tmp_path, "--extension", "mine.py", "tasks", PYTHONWARNINGS="default")
    assert "soon gone" in told and "old way" in told and "gone in a process" in told


@pytest.mark.slow
def test_a_days_commands_say_nothing_of_libraries(tmp_path: Path) -> None:
    session = drawing_session()
    session.tasks = {"infilling": get_task("infilling")}
    session.save(tmp_path / "model")
    (tmp_path / "data.csv").write_text("text,label\n" + "红色的杯子,好\n画一张图,坏\n" * 8, "utf-8")
    task = ("--task", "text_classification", "--data", "data.csv")
    own = {"OPENM6_HOME": str(tmp_path / "home"), "OPENM6_CACHE": str(tmp_path / "cache")}

    def quick(*words: object) -> str:
        done = run_openm6(*words, folder=tmp_path, environment={**os.environ, **own})
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = [  # the first in a process that imports all of it
        call(tmp_path, "finetune", "model", *task, "--steps", 2, "--method", "lora", "--output", "run"),
        quick("eval", "run/model", *task),
        quick("run", "model", "text_vector", "text=红色"),
        quick("models", "export", "model", "edge"),
        quick("models", "quantize", "model", "small"),
        quick("models", "add", "goods", "model"),
        quick("run", "goods@1", "text_vector", "text=红色"),
    ]
    for text in said:
        lines = [line for line in text.splitlines() if "Warning" in line or "WARNING" in line or "INFO" in line]
        assert not lines

"""The output of a training while it runs and at its end, on a terminal and in a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from openm6.train.report import wrap
from openm6.train.trainer import train
from tests.train.conftest import PowerCutError, cut_at, logged, tiny_recipe

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def said(folder: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> list[str]:
    capsys.readouterr()
    train(tiny_recipe(folder, **changes))
    return [line.rstrip() for line in CODES.sub("", capsys.readouterr().err).splitlines() if line.strip()]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_last_line_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    folder = tmp_path / ("long" * 20) / "[a]"
    lines = said(folder, capsys)
    assert re.fullmatch(
        rf"Trained 6 steps; [0-9.]+ Wh, [0-9.]+ g CO2e \(CHN; .*\). Model: {re.escape(str(folder))}/model", lines[-1]
    )
    assert "GPT" not in "".join(lines)
    assert not terminal or "tokens/s" in lines[-2]


def test_a_file_is_told_the_time_that_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in said(tmp_path, capsys, steps=5, log_every=2) if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/5", "5/5"]
    assert re.search(r"  loss [0-9.]+  \d+:\d\d:\d\d left  [0-9.]+ s/step  [0-9,]+ tokens/s", lines[0])
    assert "  0:00:00 left  " in lines[1]
    assert all(len(line) <= 80 for line in lines)
    assert [line["step"] for line in logged(tmp_path) if "loss" in line] == [2, 4, 5]


@pytest.mark.slow
def test_a_long_run_says_after_two_steps_how_long_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PowerCutError):
        train(tiny_recipe(tmp_path / "long", steps=10_000_000, log_every=4), cut_at(4))
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"9,999,998 steps of [0-9.]+ s are left: about [0-9]+ days?, [0-9:]+\.", lines[-1])
    assert not any("are left" in line for line in said(tmp_path / "short", capsys))


@given(st.lists(st.text("ab", min_size=1, max_size=70), min_size=1))
def test_no_figure_is_broken_and_no_line_longer_than_80_characters(figures: list[str]) -> None:
    lines = wrap(figures)
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(lines).split() == figures

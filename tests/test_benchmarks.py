"""What a benchmark has measured is written before it is shown, and can be shown."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.common import report, show
from openm6.serve.server import TaskRequest
from tests.conftest import drawing_bundle

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_committed_results_can_be_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(file.read_text("utf-8"))
    assert content["name"] in NAMES and content["title"] == import_module(f"benchmarks.{content['name']}").TITLE
    show(content["title"], content["rows"], content["note"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > len(content["rows"])


def test_every_benchmark_without_committed_results_is_tried_here() -> None:
    assert set(NAMES) - {json.loads(file.read_text("utf-8"))["name"] for file in RESULTS} <= {"attention", "overload"}


def test_attention_runs_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.attention import TITLE, run

    rows, note = run([(2, 1, 8, 4)])
    file = report("attention", TITLE, rows, note, tmp_path)
    assert json.loads(file.read_text("utf-8"))["rows"] == rows
    assert "plain" in capsys.readouterr().out


@pytest.mark.slow
def test_overload_runs_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.overload import TITLE, run

    drawing_bundle().save(tmp_path / "model")
    untrained = {"allow_untrained": True} if "allow_untrained" in TaskRequest.model_fields else {}
    body = {"inputs": {"text": "红"}, **untrained}
    asked = [("/v1/tasks/text_vector", json.dumps(body).encode())]
    rows, note = run(tmp_path / "model", asked, ("/v1/tasks/text_vector", "/v1/tasks/vqa"), 1.0, 1, 2_000_000)
    report("overload", TITLE, rows, note, tmp_path)
    alone, harmed = rows
    assert alone["small answers/s"] > 0 < harmed["small answers/s"]
    assert "large 413" in harmed["answers to the harmful"] and "half-sent 408" in harmed["answers to the harmful"]
    assert TITLE in capsys.readouterr().out


def test_rows_with_columns_of_their_own_make_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    show("two kinds", [{"side": "a", "times the other": 2.0}, {"side": "b", "more ms": 31.5}], "")
    lines = capsys.readouterr().out.splitlines()
    assert "times the other" in lines[2] and "more ms" in lines[2]
    assert any("31.5" in line for line in lines)


class Unshowable(float):
    def __format__(self, _: str) -> str:
        raise KeyError("times the other")


def test_results_are_written_before_they_are_shown(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"side": "a", "ms": Unshowable(1.5)}]
    with pytest.raises(KeyError):
        report("tried", "A title", rows, "", tmp_path)
    written = [json.loads(file.read_text("utf-8"))["rows"] for file in tmp_path.iterdir()]
    assert written == [[{"side": "a", "ms": 1.5}]]

"""Chains and searches: every step measured, killed and gone on with, a target met or not."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.text import Text

from openm6.compress.compress import Chain, DistillStep, check_chain, compress, search
from openm6.compress.compressed import Target, draw_pareto, front, lost, nearest, table_of
from openm6.core.errors import UsageError
from openm6.edge.runner import EdgeModel
from openm6.inference.session import Session
from openm6.train.trainer import train
from tests.conftest import command
from tests.train.conftest import SIZES, tiny_recipe

TASK = {
    "task": "vqa", "data": "demo:questions/train?pictures=30", "validation": "demo:questions/validation?pictures=20",
    "limit": 40,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.compress.compress.LEVELS", (1.0, 0.25))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "image_embedder": "patch", "image_patch": 16}
    model, data = {"preset": "demo", "sizes": sizes}, [{"source": TASK["data"], "task": "vqa"}]
    return train(tiny_recipe(folder, steps=60, model=model, data=data, learning_rate=5e-3, checkpoint_every=60))


def _chain(model: Path, output: Path, *steps: dict[str, Any], **task: Any) -> dict[str, Any]:
    return {"model": str(model), "output": str(output), "tasks": [{**TASK, **task}], "steps": list(steps)}


@pytest.mark.slow
def test_a_chain_is_measured_step_by_step(model: Path, tmp_path: Path) -> None:
    steps = [{"prune": {"layers": 1, "width": 64, "records": 8}}, {"distill": {"steps": 3, "batch_size": 4}},
             {"quantize": {"bits": 8}}, {"export": {"bits": 8}}]  # fmt: skip
    values = _chain(model, tmp_path / "out", *steps, unlabelled="demo:questions/train?pictures=5&seed=2")
    said: list[str] = []
    rows = compress(check_chain(values), said.append)
    assert [row["step"] for row in rows] == ["0-model", "1-prune", "2-distill", "3-quantize", "4-export"]
    assert rows[1]["parameters"] == rows[2]["parameters"] < rows[0]["parameters"]
    assert rows[3]["bytes"] < 0.5 * rows[2]["bytes"] and rows[2]["parameters"] == rows[4]["parameters"]
    for row in rows:
        assert row["latency_16_ms"] > 0 and row["latency_1_ms"] > 0 and set(row["metrics"]) == {"vqa"}
    # A package runs without PyTorch, and what is measured of it says so.
    assert rows[4]["peak_mib"] < 0.6 * rows[3]["peak_mib"] < 4000
    assert (tmp_path / "out/2-distill/answers").is_dir()
    assert Session.load(rows[1]["path"], "cpu", trainable=True).model.config.num_hidden_layers == 1
    assert "vqa" in EdgeModel(rows[4]["path"]).tasks
    heads, cells = table_of(rows)
    report = (tmp_path / "out/report.md").read_text("utf-8")
    assert all(row[0] in report for row in cells) and heads[-1] == "vqa accuracy"
    assert (tmp_path / "out/pareto.png").stat().st_size > 5000
    # Given again nothing is done again, but what is missing.
    done = len(said)
    (tmp_path / "out/4-export.json").unlink()
    again = compress(check_chain(values), said.append)
    assert [row["step"] for row in again] == [row["step"] for row in rows] and len(said) == done + 1
    with pytest.raises(UsageError, match="another chain"):
        compress(check_chain(_chain(model, tmp_path / "out", *steps[:2])))


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes alone: a process for every step takes seconds, and the chain's test has them."""

    def told(made: Path, _: Any) -> dict[str, Any]:
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
        return {"parameters": size, "bytes": size, "latency_1_ms": 1.0, "latency_16_ms": 2.0, "peak_mib": 1.0}

    monkeypatch.setattr("openm6.compress.compress._footprint", told)


@pytest.mark.slow
@pytest.mark.usefixtures("_unmeasured")
def test_a_search_stops_at_the_target(model: Path, tmp_path: Path) -> None:
    chain = check_chain(_chain(model, tmp_path / "out"))
    short = DistillStep(steps=1, batch_size=4)
    rows, found, near = search(chain, Target("bytes", 1e9), 0.99, distill=short)
    assert near == ""
    assert found is not None and found["step"].startswith("100-export") and len(rows) == 4  # the whole network will do
    assert json.loads((tmp_path / "out/table.json").read_text())["found"]["step"] == found["step"]
    assert "vqa" in EdgeModel(tmp_path / "out/best").tasks
    smaller = min(row["bytes"] for row in rows)
    with pytest.raises(UsageError, match="another chain"):  # what is there was trained for fewer steps
        search(chain, Target("bytes", smaller - 1), 0.99, distill=DistillStep(steps=2, batch_size=4))
    _, found, _ = search(chain, Target("bytes", smaller - 1), 0.99, distill=short)
    assert found is not None and found["bytes"] < smaller and not found["step"].startswith("100-")


def test_what_a_row_is_worth() -> None:
    rows = [
        {"step": str(n), "bytes": size, "metrics": {"a": {"accuracy": right}, "b": {"perplexity": odd}}}
        for n, (size, right, odd) in enumerate([(10, 0.9, 3.0), (5, 0.88, 3.5), (4, 0.7, 3.0), (6, 0.87, 3.0)])
    ]
    assert [row["step"] for row in front(rows, "bytes")] == ["2", "1", "0"]
    assert lost(rows[0], rows[1]) == pytest.approx(1 / 6) and lost(rows[0], rows[3]) == pytest.approx(1 / 30)


@pytest.mark.parametrize(("metric", "whole"), [("accuracy", 0.9), ("bleu", 66.3), ("cider", 4.0)])
def test_a_loss_is_relative_to_the_model_whatever_the_scale_of_the_metric(metric: str, whole: float) -> None:
    parent, row = ({"metrics": {"a": {metric: value}}} for value in (whole, 0.99 * whole))
    assert lost(parent, row) == pytest.approx(0.01)
    assert lost(parent, parent) == 0 and lost(row, parent) < 0


def _row(step: str, size: float, right: float, time: float = 1.0) -> dict[str, Any]:
    return {"step": step, "bytes": size, "latency_1_ms": time, "metrics": {"vqa": {"accuracy": right}}}


def test_a_target_that_is_missed_tells_what_came_nearest() -> None:
    parent, target = _row("0-model", 8e6, 0.9), Target("bytes", 1e6)
    tried = [_row("100-export-8", 2.5e6, 0.899), _row("50-export-32", 3e6, 0.9), _row("50-export-4", 0.9e6, 0.7),
             _row("25-export-4", 0.5e6, 0.4)]  # fmt: skip
    good, small = "100-export-8 (2.50 MB, 0.1% lost)", "50-export-4 (0.90 MB, 22.2% lost)"
    assert nearest(tried, parent, target, 0.01) == f"Nearest: {good} and {small}."
    assert nearest(tried[:2], parent, target, 0.01) == f"Nearest: {good}."
    assert nearest(tried[2:], parent, target, 0.01) == f"Nearest: {small}."
    assert nearest(tried[2:], parent, Target("bytes", 1e5), 0.01) == "Nearest: 25-export-4 (0.50 MB, 55.6% lost)."
    assert "(1.00 ms, " in nearest(tried, parent, Target("latency_1_ms", 0.5), 0.01)


@pytest.mark.slow
def test_no_label_of_the_plot_covers_another() -> None:
    """Rows of a search lie close together: one network in three forms is equally quick and equally right."""
    rows = [_row("0-model", 8e6, 0.9, 5.0)]
    for level in (100, 75, 50, 35, 25, 15):
        for bits in (32, 8, 4):
            rows.append(
                _row(
                    f"{level}-export-{bits}", level * bits * 2e3, 0.9 - 0.5 / level - 1e-4 / bits, level / 20 + bits / 9
                )
            )
    figure = draw_pareto(rows, Target("bytes", 1e6), 0.01)
    figure.draw_without_rendering()
    labels = [[text for text in axis.texts if text.get_text()] for axis in figure.axes]
    assert all(len(texts) > 5 for texts in labels)
    for texts in labels:
        boxes = [Text.get_window_extent(text) for text in texts]  # without the line to its point
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert max(Text.get_window_extent(text).x1 for text in labels[0]) < figure.axes[1].bbox.x0


@pytest.mark.parametrize(
    ("text", "what", "most"),
    [
        ("size=2MB", "bytes", 2e6),
        ("size=1.5GB", "bytes", 1.5e9),
        ("size=2MiB", "bytes", 2**21),
        ("latency=5ms", "latency_1_ms", 5),
    ],
)
def test_targets(text: str, what: str, most: float) -> None:
    target = Target.of(text)
    assert (target.what, target.most) == (what, most)
    assert target.is_met({what: most}) and not target.is_met({what: most * 1.01})


@pytest.mark.parametrize("text", ["size=2", "size=xMB", "speed=2ms", "latency=5", "latency=1.2.3ms", "latency=0ms", ""])
def test_no_targets(text: str) -> None:
    with pytest.raises(UsageError, match="write size=2MB or latency=5ms"):
        Target.of(text)


def test_the_model_of_a_chain_may_be_one_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[Chain] = []
    monkeypatch.setattr("openm6.cli.checks.find_model", lambda model: (tmp_path / "live", str(model)))
    monkeypatch.setattr("openm6.compress.compress.compress", lambda chain, say: chains.append(chain) or [])
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(_chain(Path("goods@live"), tmp_path / "out")), "utf-8")
    command("compress", file, "--json")
    assert [chain.model for chain in chains] == [tmp_path / "live"]


@pytest.mark.slow
@pytest.mark.usefixtures("_unmeasured")
def test_what_cannot_be_is_told(model: Path, tmp_path: Path) -> None:
    for steps, sentence in (
        ([{"prune": {"layers": 2}, "export": {}}], "A step is one of"), ([{}], "A step is one of"),
        ([{"prune": {"layer": 2}}], 'Did you mean "layers"'), ([{"distil": {}}], 'Did you mean "distill"'),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=sentence):
            check_chain(_chain(model, tmp_path, *steps))

    run = partial(command, "compress")
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(_chain(model, tmp_path / "out", {"quantize": {"bits": 8}})), "utf-8")
    with pytest.raises(UsageError, match="--target does nothing here"):
        run(file, "--target", "size=1MB")
    with pytest.raises(UsageError, match="Give --task"):
        run(model, "--target", "size=1MB")
    with pytest.raises(UsageError, match="cannot be read"):
        run(tmp_path / "none.yaml")
    told = json.loads(run(file, "--json").stdout)
    assert [row["step"] for row in told["rows"]] == ["0-model", "1-quantize"]
    words = ["--task", "vqa", "--data", TASK["data"], "--validation", TASK["validation"], "--limit", 20]
    output = tmp_path / "never"
    never = run(model, *words, "--target", "latency=0.000001ms", "--form", "model", "--steps", 1, "--output", output)
    assert never.exit_code == 1 and "No chain meets" in never.output and not (output / "best").exists()
    [near] = re.findall(r"Nearest: .*\n", (output / "report.md").read_text("utf-8"))
    assert "quantize" in near and "".join(near.split()) in "".join(never.output.split())

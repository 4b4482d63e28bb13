"""What a benchmark has measured is written before it is shown, and can be shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import NAMES
from benchmarks.common import report, show
from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.library import get
from openm6.tasks.processor import Processor
from tests.conftest import tiny_config

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_committed_results_can_be_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(file.read_text("utf-8"))
    assert content["name"] in NAMES and content["title"] == import_module(f"benchmarks.{content['name']}").TITLE
    show(content["title"], content["rows"], content["note"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > len(content["rows"])


NOT_RUN = {
    "cascade": "A round of learning takes 50 answers of a served cloud, three parts take two rounds: minutes.",
    "compress": "It measures eighteen models, each in a process of its own: minutes.",
    "distill": "Students are trained in processes of their own, on the whole catalogue: minutes.",
    "open_finetune": "SmolLM2's weights are downloaded, and it trains for a quarter of an hour.",
    "quantize": "torchao is kept beside the environment, and compiling its kernels takes minutes.",
    "retrieval": "The generated shop has one size, 4,000 goods that three models have to see: minutes.",
    "zero_shot": "SmolLM2's weights are downloaded (tests/real asks it).",
    "start": "It starts every command several times, a server with its console among them: minutes.",
}
"""Benchmarks whose `run` is not tried here, each with the reason; their committed results are shown above."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `runs`: tiny models in the places of those of `make demo` and `openm6 train market`."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [record["passage"] for record in open_source("market:passages/train?records=100")]
    tokenizer = Tokenizer.train(texts, 1200, 16)
    torch.manual_seed(0)
    model = M6(tiny_config(vocab_size=tokenizer.vocab_size, num_codes=16))
    grid = ImageGrid(model.config.image_stride, model.config.image_max_patches)
    tasks = [get(name) for name in ("vqa", "caption", "product_attributes", "infilling")]
    for name in ("demo", "market"):
        Session(model, Processor(tokenizer, grid, 128), tasks).save(folder / name / "model")
    recipe = {
        "name": "facts", "model": {"preset": "demo"}, "train": {"steps": 1, "row_length": 256},
        "data": [{"source": "market:facts/train?records=100", "task": "table_to_text"}],
    }  # fmt: skip
    (folder / "facts.yaml").write_text(json.dumps(recipe), "utf-8")
    return folder


Tiny = Callable[[Any, Path], tuple[list[dict[str, Any]], str]]

LAYER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "image_embedder": "none", "num_experts": 4, "experts_per_token": 1,
}  # fmt: skip

NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8}

TINY: dict[str, Tiny] = {
    "adapters": lambda b, runs: b.run(runs, b.TASKS[:1], steps=1, asked=8, seeds=1),
    "attention": lambda b, _: b.run([(2, 1, 8, 4)]),
    "decode": lambda b, _: b.run((64,), (1,), new=2),
    "experts": lambda b, _: b.run((64,), 64),
    "image_decode": lambda b, _: b.run([(4, 2)]),
    "import_checkpoint": lambda b, _: b.run({"tiny": {**b.SHAPES["Qwen3-0.6B"], **NARROW}}, 400),
    "index": lambda b, runs: b.run(2000, 64, runs / "bench-index"),
    "overload": lambda b, runs: b.run(
        runs / "demo" / "model",
        [("/v1/tasks/infilling", b'{"inputs": {"text": "____"}}')],
        ("/v1/tasks/infilling", "/v1/tasks/vqa"),
        0.5,
        1,
        1_000_000,
    ),
    "packing": lambda b, runs: b.run(str(runs / "facts.yaml"), {"demo": 1}, 4),
    "scale": lambda b, _: b.run([(1, {}), (2, {"sharding": "zero3", "experts": 2})], LAYER, 16),
    "serve": lambda b, runs: b.run(b.Load((1,), 0.2, (0.5,), servers=1, asked=42, warm=0.1), runs),
    "sharing": lambda b, _: b.run((1,), LAYER, 1),
    "sketch": lambda b, runs: b.run(runs, ("facts",), asked=4, steps=1, seeds=1),
    "sparse_attention": lambda b, _: b.run("cpu", 16),
    "tasks": lambda b, runs: b.run(b.SIDES[5:6], steps=1, asked=4, root=runs),
    "train_step": lambda b, _: b.run([b.Case(64, 1, 2, 16, 128)]),
}
"""Each benchmark at a size that a CPU has done in seconds, from the models of `runs`."""


def test_every_benchmark_is_run_here_or_has_a_reason() -> None:
    assert sorted([*TINY, *NOT_RUN]) == sorted(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_run_is_written_and_shown(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = import_module(f"benchmarks.{name}")
    rows, note = TINY[name](benchmark, runs)
    capsys.readouterr()
    file = report(name, benchmark.TITLE, rows, note, tmp_path)
    assert json.loads(file.read_text("utf-8"))["rows"] == rows
    assert len(capsys.readouterr().out.splitlines()) > len(rows) > 0


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

"""From a `small` model of the catalogue to an edge device: it, a student of it and the demo's model in 8 and 4 bits, by
PyTorch and as packages, and how long a package takes to start.

    runs/small/model    openm6 train demo with model.preset=small, and model.sizes.image_max_patches=16
    runs/demo/model     openm6 train demo

    python -m benchmarks distill
    python -m benchmarks compress
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import require_model
from openm6.compress.compress import check_chain, compress
from openm6.edge.package import export

TEACHER, STUDENT = Path("runs/small/model"), Path("runs/small/pruned-2-taught-0/model")
DEMO = Path("runs/demo/model")
WORK = Path("runs/bench-compress")
RECORDS = 500
TITLE = "From a large model to a small one"

Row = dict[str, Any]


def run() -> tuple[list[Row], str]:
    for model in (TEACHER, STUDENT, DEMO):
        require_model(model, f"see the head of {Path(__file__).name}")
    shutil.rmtree(WORK, ignore_errors=True)
    rows = [*_chain("large", TEACHER), *_chain("student", STUDENT), *_chain("demo", DEMO), *_starts()]
    note = (
        f"Accuracy on {RECORDS} questions of the test split, of combinations that no model has seen. Times are of one "
        "answer, and of 16 together, the peak is that of a process which does nothing else; a start is of the whole "
        "program, up to its first answer."
    )
    return rows, note


def _row(
    what: str, side: str, parameters: float = 0, size: float = 0, accuracy: float = 0,
    one: float | str = "", many: float | str = "", peak: float | str = "", start: float | str = "",
) -> Row:  # fmt: skip
    return {
        "what": what, "side": side, "parameters (M)": round(parameters / 1e6, 2),
        "file (MB)": round(size / 1e6, 2), "VQA %": round(100 * accuracy, 2), "1 answer (ms)": one,
        "16 answers (ms)": many, "peak (MiB)": peak, "start (s)": start,
    }  # fmt: skip


# Bits, packages


def _chain(what: str, model: Path) -> list[Row]:
    chain = check_chain({
        "model": str(model), "output": str(WORK / what),
        "tasks": [{
            "task": "vqa", "data": "demo:questions/train", "validation": "demo:questions/test", "limit": RECORDS,
        }],
        "steps": [{"quantize": {"bits": 8}}, {"quantize": {"bits": 4}},
                  {"export": {}}, {"export": {"bits": 8}}, {"export": {"bits": 4}}],
    })  # fmt: skip
    names = ("PyTorch, as trained", "PyTorch, 8 bits", "PyTorch, 4 bits", "package, fp32", "package, 8 bits",
             "package, 4 bits")  # fmt: skip
    return [
        _row(f"bits: {what}", name, row["parameters"], row["bytes"], next(iter(row["metrics"]["vqa"].values())),
             row["latency_1_ms"], row["latency_16_ms"], round(row["peak_mib"], 1))
        for name, row in zip(names, compress(chain, lambda line: print(line, flush=True)), strict=True)
    ]  # fmt: skip


def _starts() -> list[Row]:
    """The program as it is called, from nothing to its first answer, and what it says its start took of that."""
    from openm6.data.source import open_source

    photo = WORK / "photo.png"
    photo.write_bytes(next(iter(open_source("demo:questions/test", limit=1)))["image"])
    rows = []
    for bits in (None, 8):
        package = WORK / f"start-{bits or 32}"
        export(DEMO, package, bits)
        whole, own = [], []
        for _ in range(7):
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-I", str(package / "openm6-edge"), "--json", "run", "vqa", f"photo={photo}",
                 "question=这是什么商品?"], capture_output=True, text=True, check=True,
            )  # fmt: skip
            whole.append(time.perf_counter() - began)
            own.append(json.loads(done.stdout)["start_ms"] / 1000)
        size = sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
        name = f"the program, {bits or 32} bits (its own start: {median(own):.2f} s)"
        rows.append(_row("start: demo", name, size=size, start=round(median(whole), 2)))
    return rows

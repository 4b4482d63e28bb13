"""1, 2 and 4 processes on this machine: how well they share a step's work, and the bytes that they exchange against the
fewest that the layout needs.

Each process has one thread, so that up to the number of cores the work is shared, and beyond it they only queue. The
work of a step is the same for any number. On CPUs the bytes are those on the loopback interface, headers included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from openm6.model import ModelConfig
from openm6.model.count import count_parameters
from openm6.model.precision import fast_dtype

TITLE = "Scaling over processes"
SIZES = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 4096,
    "image_embedder": "none", "num_experts": 8, "experts_per_token": 2, "expert_intermediate_size": 352,
    "router": "prototype",
}  # fmt: skip
ROWS, LENGTH, STEPS = 16, 256, 9
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"sharding": "zero2"}),
    (2, {"sharding": "zero3"}),
    (2, {"sharding": "zero3", "experts": 2}),
    (4, {}),
    (4, {"sharding": "zero3"}),
    (4, {"sharding": "zero3", "experts": 2}),
    (4, {"sharding": "zero3", "experts": 4}),
]


def run(
    layouts: Iterable[tuple[int, dict[str, Any]]] = LAYOUTS, sizes: Mapping[str, Any] = SIZES, length: int = LENGTH
) -> tuple[list[dict[str, Any]], str]:
    rows = []
    alone = 0.0
    for processes, parallel in layouts:
        told = _measure(processes, parallel, sizes, length)
        seconds = median(told["seconds"])
        low, _, high = quantiles(told["seconds"], n=4)
        alone = alone or seconds
        busy = min(processes, len(os.sched_getaffinity(0)))
        least = _least_bytes(processes, parallel, told["rows"], sizes)
        sent = median(told["bytes"])
        rows.append({
            "processes": processes,
            "layout": " ".join(f"{k} {v}" for k, v in parallel.items()) or "data parallel",
            "tokens/s": round(ROWS * length / seconds),
            "spread": f"{ROWS * length / high:,.0f} to {ROWS * length / low:,.0f}",
            "efficiency": round(alone / seconds / busy, 2),
            "MB a step": round(sent / 1e6, 1),
            "least MB": round(least / 1e6, 1),
            "moved / least": round(sent / least, 2) if least else 0.0,
        })  # fmt: skip
    note = (
        f"{sizes['num_hidden_layers']} layers, hidden {sizes['hidden_size']}, 8 experts (2 a token), {ROWS} rows of "
        f"{length} positions a step whatever the number of processes, one thread each; median of {STEPS} steps, spread "
        "= quartiles. Efficiency: speed / (that of one process x the cores in use). Least bytes: ring reduction of "
        "gradients (data parallel), or gradients scattered once and weights gathered once (zero2) or twice (zero3) a "
        "step, and the rows that have to cross for experts elsewhere, four times."
    )
    return rows, note


def _measure(processes: int, parallel: dict[str, Any], sizes: Mapping[str, Any], length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        out = Path(folder) / "told.json"
        values = {
            "sizes": dict(sizes), "parallel": parallel, "rows": ROWS, "length": length, "steps": STEPS, "out": str(out),
        }  # fmt: skip
        settings.write_text(json.dumps(values))
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        subprocess.run(
            [*command, "benchmarks._scale_worker", str(settings)],
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(out.read_text())


def _least_bytes(processes: int, parallel: dict[str, Any], rows: float, sizes: Mapping[str, Any]) -> float:
    """Over all processes: (N - 1) times each tensor for a scatter or a gather, twice for an all-reduce."""
    if processes == 1:
        return 0.0
    parts = count_parameters(ModelConfig(**sizes))
    low = 2 if fast_dtype("cuda" if torch.cuda.is_available() else "cpu") == torch.bfloat16 else 4
    everything = sum(parts.values())
    if not parallel:
        return 2.0 * (processes - 1) * 4 * everything
    # Embedding, last norm and head stay gathered in fp32 from forward to backward.
    outside = parts["embedding"] + parts["head"] + sizes["hidden_size"]
    inside = everything - outside - parts["experts"]
    gathers = 2 if parallel["sharding"] == "zero3" else 1
    columns = parallel.get("experts", 1)
    dense = (processes - 1) * (outside * (4 + 4) + inside * (gathers * low + 4))
    experts = (processes // columns - 1) * parts["experts"] * (gathers * low + 4)
    return dense + experts + 4.0 * rows * sizes["hidden_size"] * low

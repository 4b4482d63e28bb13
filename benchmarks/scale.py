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
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from benchmarks.common import causal_batch
from openm6.model import M6, ModelConfig
from openm6.model.count import count_parameters
from openm6.model.precision import fast_dtype
from openm6.train.distributed import process_group
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection

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
        out = Path(folder) / "found.json"
        settings = json.dumps({"sizes": dict(sizes), "parallel": parallel, "length": length, "out": str(out)})
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        subprocess.run(
            [*command, "benchmarks.scale", settings],
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


def work(sizes: dict[str, Any], parallel: dict[str, Any], length: int, out: str) -> None:
    """One process: train some steps, and write the seconds of each, the bytes sent and the rows exchanged."""
    with process_group() as group:
        torch.manual_seed(0)
        config = ModelConfig(**sizes)
        model = M6(config).train()
        dtype = fast_dtype(group.device.type)
        model.to(group.device)
        network = Parallel(model, ParallelSection(**parallel), group, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, length + 1))[group.rank :: group.world]
        batch = causal_batch(ids).to(group.device)
        network.synchronize(True)
        seconds, sent = [], []
        for _ in range(STEPS + 2):
            group.wait()
            before, started = _sent(), time.perf_counter()
            with torch.autocast(group.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = network.run(batch)
            (output.loss / (ROWS * length) * network.scale).backward()
            network.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
            group.wait()
            seconds.append(time.perf_counter() - started)
            sent.append(_sent() - before)
        exchanges = [b.feed_forward.exchange for b in model.blocks if getattr(b.feed_forward, "exchange", None)]
        crossed = group.sum(torch.tensor(float(sum(e.rows_sent for e in exchanges)), device=group.device))
        if group.first:
            found = {"seconds": seconds[2:], "bytes": sent[2:], "rows": float(crossed) / (STEPS + 2)}
            Path(out).write_text(json.dumps(found))


def _sent() -> int:
    """Bytes sent over this machine's loopback interface: all that gloo's processes send to each other."""
    lines = (line.split() for line in Path("/proc/net/dev").read_text().splitlines())
    return next((int(fields[9]) for fields in lines if fields[0] == "lo:"), 0)


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))

"""The first stage of Pseudo-to-Real against the second: bytes and seconds of a step when layers share their weights.

Sharing promises the parameter, gradient and optimizer bytes of the distinct layers; FLOPs and activations stay those of
the full depth. Each side runs in a process of its own, so that its peak memory can be told.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from benchmarks.common import causal_batch
from openm6.model import ModelConfig
from openm6.model.files import meta_model
from openm6.model.precision import fast_dtype
from openm6.plan.footprint import Layout, States, states_by_layer, weights_of
from openm6.train.distributed import Group
from openm6.train.optimizer import make_optimizers
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection, TrainSection
from openm6.train.start import start_at_random

TITLE = "Layers that share their weights (the first stage of Pseudo-to-Real)"
SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8,
    "vocab_size": 8192, "image_embedder": "none", "num_experts": 8, "experts_per_token": 1,
}  # fmt: skip
ROWS, LENGTH, STEPS, REPEATS = 8, 256, 7, 3
MIB = 2**20


def run(
    distinct_layers: tuple[int, ...] = (12, 4, 1), sizes: Mapping[str, Any] = SIZES, repeats: int = REPEATS
) -> tuple[list[dict[str, Any]], str]:
    sides: dict[int, list[dict[str, Any]]] = {distinct: [] for distinct in distinct_layers}
    for _ in range(repeats):  # in turn, so that a noisy moment does not hit one side alone
        for distinct, told in sides.items():
            command = [sys.executable, "-m", "benchmarks.sharing", str(distinct), json.dumps(dict(sizes))]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            told.append(json.loads(done.stdout))
    rows = []
    for distinct, told in sides.items():
        weights = weights_of(meta_model(ModelConfig(**sizes, distinct_layers=distinct)))
        promised = sum(states_by_layer(weights, Layout(1, "none", 1, "none"), "adamw").values(), States())
        held, steps = told[0], [seconds for one in told for seconds in one["seconds"]]
        low, _, high = quantiles(steps, n=4)
        states = sum(held[kind] for kind in ("parameters", "gradients", "optimizer"))
        rows.append({
            "distinct layers": distinct,
            "parameters MiB": round(held["parameters"] / MIB, 1),
            "gradients MiB": round(held["gradients"] / MIB, 1),
            "optimizer MiB": round(held["optimizer"] / MIB, 1),
            "held / promised": round(states / promised.total, 4),
            "peak MiB": round(median(one["peak"] for one in told) / MIB),
            "ms a step": round(1e3 * median(steps)),
            "spread": f"{1e3 * low:.0f} to {1e3 * high:.0f}",
            "passes ms": round(1e3 * median(t for one in told for t in one["passes"])),
            "update ms": round(1e3 * median(t for one in told for t in one["updates"])),
        })  # fmt: skip
    note = (
        f"{sizes['num_hidden_layers']} layers applied, hidden {sizes['hidden_size']}, {sizes['num_experts']} experts "
        f"(1 a token), {ROWS} rows of {LENGTH} positions, AdamW, fp32 states; median of {repeats} x {STEPS} steps, "
        "spread = quartiles. Promised: by openm6 plan. Peak: what the process "
        "came to need beyond what it had before the network was built."
    )
    return rows, note


def measure(config: ModelConfig) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = fast_dtype(device.type)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1))
    batch = causal_batch(ids).to(device)
    before = _peak(cuda)
    parallel = Parallel(meta_model(config).train(), ParallelSection(), Group(0, 1, device), dtype)
    parallel.allocate()
    start_at_random(parallel.model, 0)
    optimizers = make_optimizers(parallel.model, TrainSection(steps=1))
    told: dict[str, Any] = {"seconds": [], "passes": [], "updates": []}
    for _ in range(STEPS + 2):
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = parallel.run(batch)
        (output.loss / (ROWS * LENGTH)).backward()
        parallel.clip(1.0)
        middle = _now(cuda)
        gradients = sum(p.grad.nbytes for p in parallel.model.parameters() if p.grad is not None)
        parallel.update(optimizers)
        ended = _now(cuda)
        told["seconds"].append(ended - begun)
        told["passes"].append(middle - begun)
        told["updates"].append(ended - middle)
    moments = [v for o in optimizers for state in o.state.values() for v in state.values()]
    return {
        **{name: values[2:] for name, values in told.items()},
        "parameters": sum(p.nbytes for p in parallel.model.parameters()),
        "gradients": gradients,
        "optimizer": sum(v.nbytes for v in moments),
        "peak": _peak(cuda) - before,
    }


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure(ModelConfig(**json.loads(sys.argv[2]), distinct_layers=int(sys.argv[1])))))

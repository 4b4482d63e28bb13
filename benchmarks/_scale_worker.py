"""One process of the scale benchmark: trains some steps, writes seconds a step and rows exchanged."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from openm6.core.batch import pack
from openm6.core.sequence import CAUSAL, Sequence
from openm6.model import M6, ModelConfig
from openm6.model.precision import fast_dtype
from openm6.train.distributed import process_group
from openm6.train.parallel import Parallel
from openm6.train.recipe import ParallelSection


def moved() -> int:
    """Bytes that this machine has sent to itself: all that gloo's processes say to each other."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


def main(settings: dict) -> None:
    rows, length, steps = settings["rows"], settings["length"], settings["steps"]
    with process_group() as group:
        torch.manual_seed(0)
        config = ModelConfig(**settings["sizes"])
        model = M6(config).train()
        dtype = fast_dtype(group.device.type)
        model.to(group.device)
        parallel = Parallel(model, ParallelSection(**settings["parallel"]), group, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1))[group.rank :: group.world]
        causal = np.full(length, CAUSAL, np.int32)
        batch = pack([Sequence(r[:-1].astype(np.int32), causal, r[1:].astype(np.int32)) for r in ids], length, 0)
        batch = batch.to(group.device)
        parallel.synchronize(True)
        seconds, sent = [], []
        for _ in range(steps + 2):
            group.wait()
            before, started = moved(), time.perf_counter()
            with torch.autocast(group.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = parallel.run(batch)
            (output.loss / (rows * length) * parallel.scale).backward()
            parallel.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
            group.wait()
            seconds.append(time.perf_counter() - started)
            sent.append(moved() - before)
        exchanges = [b.feed_forward.exchange for b in model.blocks if getattr(b.feed_forward, "exchange", None)]
        crossed = group.sum(torch.tensor(float(sum(e.rows_sent for e in exchanges)), device=group.device))
        if group.first:
            told = {"seconds": seconds[2:], "bytes": sent[2:], "rows": float(crossed) / (steps + 2)}
            Path(settings["out"]).write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""Shared by the benchmarks: fair timing of several sides in turn, machine facts, a table and a JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openm6.core.batch import Batch, pack
from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, Sequence
from openm6.model.precision import fast_dtype

ROOT = Path(__file__).parents[1] / "runs"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median, and the quartiles as spread."""

    median: float
    low: float
    high: float


def race(sides: dict[str, Callable[[], object]], repeats: int = 9, warmup: int = 2) -> dict[str, Timing]:
    """Time several sides in turn (a, b, a, b, ...), so that a noisy moment hits them all alike."""
    for _ in range(warmup):
        for run in sides.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high)
    return timings


def require_model(path: Path, how: str) -> None:
    """Raise UsageError, which says how to make it, where there is no model at `path`."""
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} does not exist: {how}.")


def causal_batch(ids: np.ndarray) -> Batch:
    """Rows of ids, int [B, T + 1], as causal examples: every position is trained on the next id."""
    causal = np.full(ids.shape[1] - 1, CAUSAL, np.int32)
    rows = [Sequence(row[:-1].astype(np.int32), causal, row[1:].astype(np.int32)) for row in ids]
    return pack(rows, len(causal), 0)


def training_step(model: nn.Module) -> Callable[[Callable[[], Tensor]], None]:
    """A function that does a whole training step with the loss that its argument returns: forward (bf16 autocast where
    the machine has units for it), backward, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    kind = next(model.parameters()).device.type

    def step(loss: Callable[[], Tensor]) -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=fast_dtype(kind) == torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_gradients(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """The forward pass and the gradients of `inputs`, of which the first has the shape of the output."""
    d_out = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(forward(), inputs, d_out)


def machine() -> str:
    """This machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    return f"{name}, {os.cpu_count()} cores"


def save(name: str, title: str, rows: list[dict[str, Any]], note: str, directory: Path) -> Path:
    """Write `name-PRECISION.json`, or `name-cuda.json`; the docs' benchmark page is made from these files.

    A GPU, a CPU with bf16 units and one without answer different questions: neither replaces another's file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kind = "cuda" if torch.cuda.is_available() else str(fast_dtype("cpu")).removeprefix("torch.")
    path = directory / f"{name}-{kind}.json"
    content = {
        "name": name, "title": title, "machine": machine(), "date": date.today().isoformat(),
        "torch": torch.__version__, "rows": rows, "note": note,
    }  # fmt: skip
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return path


def report(name: str, title: str, rows: list[dict[str, Any]], note: str, directory: Path) -> Path:
    """Write the results, then show them: minutes of work are not lost to a table. Returns the file."""
    path = save(name, title, rows, note, directory)
    show(title, rows, note)
    return path


def show(title: str, rows: list[dict[str, Any]], note: str) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title)
    # Rows may have columns of their own; a dict is for the JSON alone.
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict)))
    for column in columns:
        view.add_column(column)
    for row in rows:
        view.add_row(*(_cell(row.get(column, "")) for column in columns))
    console = Console(width=160)
    console.print(view)
    console.print(note, highlight=False)


def _cell(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else str(value)

"""Serving more than can be borne: small requests come at twice the peak, and on the one side a fifth of what comes is
texts of 10 MB and bodies that are sent by half.

The sides take turns at one server. What does harm comes from a process of its own (_overload_peers.py), and sending it
costs the machine that the server is on, too: on a third side as much is sent elsewhere (the sink there).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from benchmarks.common import ROOT, require_model
from benchmarks.serve import Measured, Requests, _arriving, _load, _mixed, _openm6, _served

TITLE = "Serving: large and half-sent bodies beside small requests"
OFFERED = 2.0
"""Requests a second that are sent, as a multiple of the peak."""
HARMFUL = 0.2
"""Share of them that is large or sent by half, in equal parts."""
TARGETS = ("/v1/tasks/infilling", "/v1/tasks/vqa")
"""Targets of the large texts: a task that takes text alone, and one that takes images."""
SIDES = ("small ones alone", "large and half-sent ones sent elsewhere", "large and half-sent ones too")


def run(
    model: Path = ROOT / "demo" / "model", requests: Requests | None = None, targets: tuple[str, ...] = TARGETS,
    seconds: float = 15.0, turns: int = 3, large: int = 10_000_000,
) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    """`large`: bytes of a large text. Smaller arguments are for a test."""
    require_model(model, "run `make demo` first")
    requests = requests or _openm6(_mixed())
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    answers = Counter[str]()
    with _served(model)() as url, _sink() as sink:
        uvloop.run(_load(url, requests, 8, min(2.0, seconds)))  # warm
        peak, *_ = uvloop.run(_load(url, requests, 64, seconds))
        for _ in range(turns):
            for side, harmed in zip(SIDES, (None, sink, url), strict=True):
                load = _harm(harmed, OFFERED * HARMFUL * peak, seconds, large, targets) if harmed else None
                found[side].append(uvloop.run(_arriving(url, requests, OFFERED * (1 - HARMFUL) * peak, seconds)))
                counts = json.loads(load.communicate(timeout=120)[0]) if load else {}
                if harmed == url:
                    answers.update(counts)
    rows = [_row(side, measured, peak) for side, measured in found.items()]
    for before, row in pairwise(rows):
        for name, what in {"answers of": "small answers/s", "p99 times": "answer ms p99"}.items():
            row[f"{name} the side before"] = round(row[what] / before[what], 2) if before[what] else None
    rows[-1]["answers to the harmful"] = ", ".join(f"{count} x {status}" for status, count in sorted(answers.items()))
    note = (
        f"The peak is {peak:.0f} requests a second (64 clients, closed loop). Small requests, the demo's tasks mixed, "
        f"come {OFFERED * (1 - HARMFUL):.1f} times as often, others {OFFERED * HARMFUL:.1f} times: half of them texts "
        f"of {large / 1e6:.0f} MB, half bodies of which a half comes. Medians of {turns} turns of {seconds:.0f} s; "
        "the server, its model and both clients share the machine."
    )
    return rows, note


@contextmanager
def _sink() -> Iterator[str]:
    words = [sys.executable, "-m", "benchmarks._overload_peers", "sink"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def _row(side: str, turns: list[Measured], peak: float) -> dict[str, Any]:
    rate = median(one[0] for one in turns)
    return {
        "side": side, "small answers/s": round(rate, 1), "of the peak": round(rate / peak, 2),
        "first ms p50": _quantile(turns, 1, 0.5), "first ms p99": _quantile(turns, 1, 0.99),
        "answer ms p50": _quantile(turns, 2, 0.5), "answer ms p99": _quantile(turns, 2, 0.99),
        "small refused": sum(one[3] for one in turns),
    }  # fmt: skip


def _quantile(turns: list[Measured], which: int, share: float) -> float:
    return round(1000 * median(float(np.quantile(one[which], share)) for one in turns), 1)


def _harm(url: str, rate: float, seconds: float, large: int, targets: tuple[str, ...]) -> subprocess.Popen[bytes]:
    words = [url, str(rate), str(seconds), str(large), *targets]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks._overload_peers", "load", *words], stdout=subprocess.PIPE
    )

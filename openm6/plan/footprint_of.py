"""The process that measures a model directory or package: `python -m openm6.plan.footprint_of PATH TASK RECORDS`.

Of its own, so that the peak of its memory is the model's alone, and a package is measured without PyTorch. RECORDS is a
file with JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from openm6.core.environment import peak_resident
from openm6.core.files import loads

WARM, REPEATS = 2, 9


def main(path: Path, task: str, records: list[Any]) -> None:
    model: Any
    if (path / "edge.json").is_file():
        from openm6.edge.runner import EdgeModel

        model = EdgeModel(path, int(os.environ.get("OMP_NUM_THREADS", "0")))
        parameters = model.about["parameters"]
    else:
        from openm6.inference.session import Session
        from openm6.model.count import count_parameters

        model = Session.load(path)
        parameters = sum(count_parameters(model.model.config).values())
    one = _milliseconds(lambda number: list(model.run_many(task, [records[number % len(records)]], truncate="start")))
    every = _milliseconds(lambda _: list(model.run_many(task, records, truncate="start")))
    told = {"parameters": parameters, "latency_1_ms": one, "latency_16_ms": every, "peak_mib": peak_resident() / 2**20}
    print(json.dumps(told))


def _milliseconds(act: Callable[[int], object]) -> float:
    """The median of one call."""
    seconds = []
    for number in range(WARM + REPEATS):
        started = time.perf_counter()
        act(number)
        seconds.append(time.perf_counter() - started)
    return round(1000 * median(seconds[WARM:]), 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], loads(Path(sys.argv[3]).read_bytes()))

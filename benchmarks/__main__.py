"""Run one benchmark: `python -m benchmarks train_step [--out DIR]`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from benchmarks.common import report
from openm6.core.errors import UsageError

NAMES = (
    "train_step", "decode", "packing", "attention", "experts", "scale", "sharing", "image_decode", "sparse_attention",
    "tasks", "sketch", "index", "adapters", "retrieval", "serve", "overload", "cascade", "compress", "quantize",
    "distill", "start", "import_checkpoint", "zero_shot",
    "open_finetune",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", type=lambda text: text.replace("-", "_"), choices=NAMES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    benchmark = import_module(f"benchmarks.{arguments.name}")
    try:
        rows, note = benchmark.run()
    except UsageError as error:
        parser.exit(2, f"{error}\n")
    print(report(arguments.name, benchmark.TITLE, rows, note, arguments.out))


if __name__ == "__main__":
    main()

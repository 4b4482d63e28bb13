"""`python -m reproduce NAME [--scale small|large] [--out DIR]`: train, compare, write a page."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from reproduce.common import ROOT, SCALES

NAMES = (
    "prototyping",
    "auxiliary_loss",
    "capacity",
    "pseudo_to_real",
    "sparse_vs_dense",
    "progressive",
    "five_percent",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description=__doc__)
    parser.add_argument("name", type=lambda text: text.replace("-", "_"), choices=NAMES)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--work", type=Path, default=None, help="where runs are kept; a stopped one goes on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reproduce")
    arguments = parser.parse_args()
    work = arguments.work or ROOT / "runs" / "reproduce" / f"{arguments.name}-{arguments.scale}"
    claim = import_module(f"reproduce.{arguments.name}")
    print(claim.run(SCALES[arguments.scale], work.resolve(), arguments.out))


if __name__ == "__main__":
    main()

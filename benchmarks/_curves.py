"""Plots of the last results for the documentation, docs/images/cascade.png (accuracy of a cascade by the fraction of
requests it defers) and load.png (throughput and latency of a server by its load): `python -m benchmarks._curves`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
HEADS = ("before learning", "after one round", "after two rounds")


def _rows(name: str) -> list[dict[str, Any]]:
    content = json.loads((HERE / "results" / f"{name}-bfloat16.json").read_text("utf-8"))
    return list(content["rows"])


def cascade() -> None:
    rows = [row for row in _rows("cascade") if row["seed"] == "median" and row["privacy"] == "all"]
    figure, sides = plt.subplots(1, len(rows), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axes, row, head in zip(sides, rows, HEADS, strict=True):
        curve = row["curve"]
        for name, label, colour in (
            ("oracle", "an oracle", "0.7"), ("sureness", "the least sure first", "tab:blue"),
            ("random", "at random", "tab:orange"),
        ):  # fmt: skip
            axes.plot(curve["share"], curve[name], color=colour, label=label)
        axes.axhline(row["cloud only"], color="0.5", linestyle=":", linewidth=1)
        axes.plot([row["sent %"]], [row["cascade"]], "o", color="tab:green", label="the device, audits included")
        axes.set(title=head, xlabel="sent, % of requests", xlim=(0, 100))
        axes.grid(alpha=0.3)
    sides[0].set_ylabel("right answers, %")
    sides[0].legend(frameon=False, loc="lower right")
    figure.savefig(IMAGES / "cascade.png", dpi=110)


def load() -> None:
    rows = [row for row in _rows("serve") if str(row["clients"]).endswith("a second")]
    asked = [float(row["clients"].split()[0]) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(asked, asked, color="0.8", linestyle="--", label="asked")
    left.plot(asked, [row["requests/s"] for row in rows], marker="o", color="tab:blue", label="answered in time")
    left.set(xlabel="requests a second that come", ylabel="answers a second", ylim=(0, None), xlim=(0, None))
    for key, label, colour in (
        ("first ms p50", "first token, median", "tab:green"), ("first ms p99", "first token, 99%", "tab:orange"),
        ("answer ms p50", "whole answer, median", "tab:blue"),
    ):  # fmt: skip
        right.plot(asked, [row[key] for row in rows], marker="o", color=colour, label=label)
    right.set(xlabel="requests a second that come", ylabel="milliseconds", yscale="log", xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(IMAGES / "load.png", dpi=110)


if __name__ == "__main__":
    cascade()
    load()

"""The picture of what is answered, and how soon, by how much is asked: `python -m benchmarks._serve_curve` makes
docs/images/load.png of the last result."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    result = json.loads((HERE / "results" / "serve-bfloat16.json").read_text("utf-8"))
    rows = [row for row in result["rows"] if str(row["clients"]).endswith("a second")]
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
    figure.savefig(HERE.parent / "docs" / "images" / "load.png", dpi=110)


if __name__ == "__main__":
    main()

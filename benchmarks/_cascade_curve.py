"""The picture of how right a cascade is by how much it sends: `python -m benchmarks._cascade_curve` makes
docs/images/cascade.png of the last result."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
HEADS = ("before learning", "after one round", "after two rounds")


def main() -> None:
    result = json.loads((HERE / "results" / "cascade-bfloat16.json").read_text("utf-8"))
    rows = [row for row in result["rows"] if row["seed"] == "median" and row["privacy"] == "all"]
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
    figure.savefig(HERE.parent / "docs" / "images" / "cascade.png", dpi=110)


if __name__ == "__main__":
    main()

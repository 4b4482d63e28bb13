"""The target of a compression, and its report: table and plot.

A row has step, path, parameters, bytes, peak_mib, latency_1_ms, latency_16_ms, and by task its metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openm6.core.errors import UsageError
from openm6.core.extras import require
from openm6.core.units import size_of
from openm6.tasks.metrics import gain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Target:
    """An upper limit of bytes, or of milliseconds for one answer."""

    what: str
    most: float

    @classmethod
    def of(cls, text: str) -> Target:
        """`size=2MB` or `latency=5ms`. Raises UsageError for anything else."""
        latency = re.fullmatch(r"latency=([0-9.]+)ms", text)
        try:
            if text.startswith("size="):
                return cls("bytes", size_of(text.removeprefix("size=")))
            if latency and float(latency[1]) > 0:
                return cls("latency_1_ms", float(latency[1]))
        except ValueError:
            pass
        raise UsageError(f"The target {text!r} is invalid: write size=2MB or latency=5ms.")

    def is_met(self, row: Mapping[str, Any]) -> bool:
        return bool(row[self.what] <= self.most)

    def figure(self, row: Mapping[str, Any]) -> str:
        """The size or time of a row."""
        value = float(row[self.what])
        return f"{value / 1e6:.2f} MB" if self.what == "bytes" else f"{value:.2f} ms"


def lost(parent: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The largest loss of the first metric over the tasks, as a fraction of the parent's value, whatever the scale of
    the metric: 0.01 from accuracy 0.9 to 0.891, and from BLEU 60 to 59.4."""
    pairs = [(first_of(parent, task), first_of(row, task)) for task in parent["metrics"]]
    return max((before - after) / max(abs(before), 1e-9) for before, after in pairs)


def first_of(row: Mapping[str, Any], task: str) -> float:
    name, value = next(iter(row["metrics"][task].items()))
    return gain(name, float(value))


def line_of(row: Mapping[str, Any]) -> str:
    step, millions, size, peak, one, many = _figures(row)
    metrics = ", ".join(f"{task} {next(iter(some.values())):.3f}" for task, some in row["metrics"].items())
    return f"{step}: {millions}M, {size} MB, {peak} MiB, {one} / {many} ms, {metrics}"


def nearest(tried: list[dict[str, Any]], parent: Mapping[str, Any], target: Target, max_loss: float) -> str:
    """A sentence about the rows `tried` that came nearest to a target that none has met: the smallest of those that
    lose no more than `max_loss`, and the one that loses least of those that are small enough."""
    good = [row for row in tried if lost(parent, row) <= max_loss + 1e-9]
    small = [row for row in tried if target.is_met(row)]
    near = [min(good or ([] if small else tried), key=lambda row: row[target.what], default=None)]
    near.append(min(small, key=lambda row: lost(parent, row), default=None))
    described = [f"{row['step']} ({target.figure(row)}, {lost(parent, row):.1%} lost)" for row in near if row]
    return f"Nearest: {' and '.join(described)}."


COLUMNS = ("step", "parameters (M)", "file (MB)", "peak memory (MiB)", "1 answer (ms)", "16 answers (ms)")


def table_of(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a metric with its change from the first row."""
    first = rows[0]["metrics"]
    names = [(task, name) for task, some in first.items() for name in some]
    cells = []
    for row in rows:
        values = [(row["metrics"][task].get(name), first[task][name]) for task, name in names]
        cells.append([*_figures(row), *("" if v is None else f"{v:.3f} ({v - old:+.3f})" for v, old in values)])
    return [*COLUMNS, *(f"{task} {name}" for task, name in names)], cells


def _figures(row: Mapping[str, Any]) -> list[str]:
    """The cells of COLUMNS."""
    return [
        row["step"], f"{row['parameters'] / 1e6:.2f}", f"{row['bytes'] / 1e6:.2f}", f"{row['peak_mib']:.0f}",
        f"{row['latency_1_ms']:.1f}", f"{row['latency_16_ms']:.1f}",
    ]  # fmt: skip


def report_of(
    rows: list[dict[str, Any]], target: Target | None, max_loss: float, found: dict[str, Any] | None, near: str = ""
) -> str:
    heads, cells = table_of(rows)
    lines = ["# Compressed", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    if target:
        wanted = f"{target.what} at most {target.most:g}, at most {max_loss:.1%} lost"
        lines += ["", f"Target: {wanted}. " + (f"Met by {found['step']}." if found else f"No chain met it. {near}")]
    lines += ["", "![](pareto.png)", ""]
    return "\n".join(lines)


def front(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The Pareto front of the rows by `what` and the first metric; the smallest first."""
    task = next(iter(rows[0]["metrics"]))
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[what], -first_of(row, task))):
        if not found or first_of(row, task) > first_of(found[-1], task):
            found.append(row)
    return found


def draw_pareto(rows: list[dict[str, Any]], target: Target | None = None, max_loss: float = 0.0) -> Figure:
    """The first metric against size and against the time of one answer; the front as a line. The front and the model
    have labels in a column beside the points, so that no label covers another."""
    require("eval", "matplotlib")
    from matplotlib import ticker
    from matplotlib.figure import Figure

    task = next(iter(rows[0]["metrics"]))
    name = next(iter(rows[0]["metrics"][task]))
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what, label, unit in (
        (axes[0], "bytes", "file, MB", 1e6), (axes[1], "latency_1_ms", "one answer, ms", 1.0),
    ):  # fmt: skip
        best = front(rows, what)
        axis.plot([row[what] / unit for row in best], [first_of(row, task) for row in best], color="#c9962b", zorder=1)
        for row in rows:
            colour = "#8a5a00" if row in best else "#b8b8b8"
            axis.scatter([row[what] / unit], [first_of(row, task)], color=colour, zorder=2)
        labelled = sorted((row for row in rows if row in best or row is rows[0]), key=lambda row: first_of(row, task))
        for number, row in enumerate(labelled):
            axis.annotate(
                row["step"], (row[what] / unit, first_of(row, task)), (1.03, (number + 0.5) / len(labelled)),
                textcoords="axes fraction", va="center", fontsize=min(8.0, 200 / len(labelled)),
                arrowprops={"arrowstyle": "-", "color": "#b8b8b8", "linewidth": 0.6},
            )  # fmt: skip
        if target and target.what == what:
            axis.axvline(target.most / unit, color="#888888", linestyle=":", linewidth=1)
        whole = first_of(rows[0], task)
        axis.axhline(whole - max_loss * abs(whole), color="#888888", linestyle=":", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlabel(label)
    axes[0].set_ylabel(f"{task}: {name}")
    return figure

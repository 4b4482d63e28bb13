"""Reports of a training run: progress, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openm6.core.energy import EnergyMeter, EnergyUse, peak_memory
from openm6.core.extras import install_command, is_installed
from openm6.core.files import cut_torn_line, dumps, write_text
from openm6.data.rejects import count_rejected
from openm6.train.expert_statistics import plot_expert_statistics
from openm6.train.recipe import AnyRecipe, recipe_text

Losses = list[tuple[str, str, float, int]]

EXPERTS_LOG = "experts.jsonl"
SCALARS = (
    "loss", "learning_rate", "gradient_norm", "tokens_per_second", "model_flops_utilization", "peak_memory_bytes",
    "energy_kwh", "load_variation", "load_dropped",
)  # fmt: skip

MONITORS = {
    "codecarbon": "energy", "tensorboard": "curves for TensorBoard", "matplotlib": "a picture of the experts' load",
}  # fmt: skip
"""Libraries of the extra monitor, and what a run records with each."""
LONG = 600
"""Seconds from which on the expected length of a run is shown after its second step, before the first line."""

WIDTH = 80
"""Characters of a progress line: what does not fit is in metrics.jsonl and TensorBoard alone."""


def say(text: str, console: Console | None = None) -> None:
    """Print a line for the user, unbroken: a terminal wraps it, a file has it in one piece."""
    (console or Console(stderr=True)).print(text, highlight=False, markup=False, soft_wrap=True)


class Step(NamedTuple):
    """Figures of a step: its number from 1, losses over all processes, learning rate, gradient norm, seconds, FLOPs and
    real positions over all processes, and the fraction of the positions that are no padding."""

    number: int
    losses: Losses
    rate: float
    norm: float
    seconds: float
    flops: float
    positions: float
    filled: float


class Reporter:
    """Collects steps and writes a line at every `log` call. One per run, on the first process."""

    def __init__(self, output: Path, recipe: AnyRecipe, on_step: Callable[[dict[str, Any]], None] | None):
        self.console = Console(stderr=True)
        self.recipe, self.output, self.on_step = recipe, output, on_step
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "recipe.yaml", recipe_text(recipe))
        for log in (output / "metrics.jsonl", output / EXPERTS_LOG):
            cut_torn_line(log)
        self.lines = (output / "metrics.jsonl").open("a", encoding="utf-8")
        self.board: Any = None  # made with its first point: it takes a third of the time of PyTorch's import
        self.bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),  # gives way, so that the figures stay whole
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self.row = self.bar.add_task(recipe.name, total=recipe.train.steps, figures="")
        self.peak = math.inf
        self.taken = 0
        self.steps: list[Step] = []  # since the last line
        absent = [what for module, what in MONITORS.items() if not is_installed(module)]
        if absent:
            self.say(f"Not recorded, as not installed: {', '.join(absent)} ({install_command('monitor')}).")

    def say(self, text: str) -> None:
        say(text, self.console)

    def start(self, step: int, peak: float) -> None:
        self.peak = peak
        if self.console.is_terminal:
            self.bar.start()
        self.bar.update(self.row, completed=step)
        self.since = time.perf_counter()

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.taken += 1
        left = self.recipe.train.steps - step.number
        seconds = left * step.seconds
        if self.taken == 2 and seconds > LONG:  # the first step makes buffers, and takes longer
            self.say(f"{left:,} steps of {step.seconds:.2f} s are left: about {timedelta(seconds=round(seconds))}.")
        self.bar.update(self.row, completed=step.number)

    def log(self, energy: EnergyMeter, experts: Mapping[str, Any]) -> None:
        """Write a line for the steps since the last one. Times include waiting for data.

        `experts` (ExpertStatistics.statistics) goes to experts.jsonl, its means over the layers to metrics.jsonl
        too."""
        elapsed, count, last = time.perf_counter() - self.since, len(self.steps), self.steps[-1]
        losses = [loss for step in self.steps for loss in step.losses]
        flops, positions = (sum(getattr(step, name) for step in self.steps) for name in ("flops", "positions"))
        use, memory = energy.read(), peak_memory()
        line: dict[str, Any] = {
            "step": last.number, "loss": _mean(losses),
            "loss_by_task": _means(losses, 0), "loss_by_source": _means(losses, 1),
            "learning_rate": last.rate, "gradient_norm": last.norm,
            "seconds_per_step": elapsed / count, "tokens_per_second": positions / elapsed,
            "tflops": flops / elapsed / 1e12, "model_flops_utilization": flops / elapsed / self.peak,
            "row_fill": sum(step.filled for step in self.steps) / count,
            "waiting_for_data": max(0.0, 1 - sum(step.seconds for step in self.steps) / elapsed),
            "peak_memory_bytes": memory,
        }  # fmt: skip
        if use:
            line |= {"energy_kwh": use.kwh, "energy_measured": use.measured}
        if experts:
            line |= {key: sum(experts[key]) / len(experts[key]) for key in ("load_variation", "load_dropped")}
            with (self.output / EXPERTS_LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": last.number, **experts}) + "\n")
        self._write(line)
        scalars = {key: line[key] for key in SCALARS if key in line}
        for kind in ("loss_by_task", "loss_by_source"):
            scalars |= {f"{kind}/{name}": value for name, value in line[kind].items()}
        self._plot(scalars, last.number)
        self.bar.update(self.row, figures=f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")
        every, steps = self.recipe.train.log_every, self.recipe.train.steps
        shown = last.number <= every or last.number % (10 * every) == 0 or last.number == steps
        if shown and not self.console.is_terminal:
            left = timedelta(seconds=round((steps - last.number) * line["seconds_per_step"]))
            figures = (
                f"step {last.number}/{steps}", f"loss {line['loss']:.3f}", f"{left} left",
                f"{line['seconds_per_step']:.2f} s/step", f"{line['tokens_per_second']:,.0f} tokens/s",
                f"{line['model_flops_utilization']:.0%} of peak", f"{memory / 2**30:.1f} GiB",
            )  # fmt: skip
            self.say(wrap(figures)[0])
        self.steps, self.since = [], time.perf_counter()

    def evaluation(self, step: int, name: str, scores: Mapping[str, float]) -> None:
        self._write({"step": step, "evaluation": name, **scores})
        self._plot({f"evaluation/{name}/{metric}": value for metric, value in scores.items()}, step)
        for text in wrap((f"step {step}  {name}:", *(f"{metric} {value:.3f}" for metric, value in scores.items()))):
            self.say(text)
        self.since = time.perf_counter()

    def finish(self, step: int, use: EnergyUse | None, examples: int, cut: int) -> None:
        """Write the last lines of a run of `examples` examples, of which `cut` were longer than the model takes."""
        skipped = count_rejected(self.output)
        counts = {"examples": examples, "cut": cut, "skipped_records": skipped}
        line: dict[str, Any] = {"step": step, "finished": True, **counts}
        energy = ""
        if use:
            line |= {"energy_kwh": use.kwh, "co2e_kg": use.co2e_kg, "energy_measured": use.measured}
            known = f"{use.measured:.0%} measured" if use.measured else "estimated"
            grams = f"{use.kwh * 1000:.1f} Wh, {use.co2e_kg * 1000:.1f} g CO2e"
            energy = f"; {grams} ({self.recipe.train.country}; {known})"
        self._write(line)
        if (self.output / EXPERTS_LOG).is_file() and is_installed("matplotlib"):
            plot_expert_statistics(self.output / EXPERTS_LOG, self.output / "experts.png")
        self._stop_bar()  # which would be drawn over the last line
        self.say(f"Trained {step} steps{energy}. Model: {self.output / 'model'}")
        if cut:
            self.say(
                f"{cut:,} of {examples:,} examples were longer than the model takes and lost their ends: "
                "`openm6 data check --model` tells by how much, model.max_length gives them more room."
            )
        if skipped:
            self.say(f"{skipped:,} records could not be used and were left out: {self.output / 'rejects.jsonl'}")

    def _stop_bar(self) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def close(self) -> None:
        self._stop_bar()
        if self.board:
            self.board.close()
        self.lines.close()

    def _plot(self, scalars: Mapping[str, float], step: int) -> None:
        if not is_installed("tensorboard"):
            return
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.output / "tensorboard"))
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.write(dumps(line) + "\n")
        self.lines.flush()
        if self.on_step:
            self.on_step(line)


def wrap(figures: Iterable[str]) -> list[str]:
    """Figures in lines of at most WIDTH characters, none of them broken; what follows the first line is indented."""
    lines: list[str] = []
    for figure in figures:
        if lines and len(lines[-1]) + 2 + len(figure) <= WIDTH:
            lines[-1] += "  " + figure
        else:
            lines.append("  " + figure if lines else figure)
    return lines


def _mean(losses: Losses) -> float:
    return sum(loss for *_, loss, _ in losses) / max(1, sum(number for *_, number in losses))


def _means(losses: Losses, key: int) -> dict[str, float]:
    groups: dict[str, Losses] = defaultdict(list)
    for entry in losses:
        groups[str(entry[key])].append(entry)
    return {name: _mean(group) for name, group in sorted(groups.items())}

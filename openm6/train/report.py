"""What a training run tells: a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openm6.core.energy import EnergyMeter, EnergyUse, peak_memory
from openm6.core.extras import install_command, is_installed
from openm6.core.files import cut_torn_line, dumps, write_text
from openm6.data.rejects import count_rejected
from openm6.train.expert_load import draw_loads
from openm6.train.recipe import AnyRecipe, recipe_text

Losses = list[tuple[str, str, float, int]]

LOADS = "experts.jsonl"
SCALARS = (
    "loss", "learning_rate", "gradient_norm", "tokens_per_second", "share_of_peak", "peak_memory_bytes", "energy_kwh",
    "load_variation", "load_dropped",
)  # fmt: skip

MONITORS = {
    "codecarbon": "energy", "tensorboard": "curves for TensorBoard", "matplotlib": "a picture of the experts' load",
}  # fmt: skip
"""What a run records by the libraries of the extra monitor."""
LONG = 600
"""Seconds that a run has to take for its length to be told after its first steps, before the first line."""


def say(text: str, console: Console | None = None) -> None:
    """The line that the user sees, whole: a terminal wraps it, a file has it in one piece."""
    (console or Console(stderr=True)).print(text, highlight=False, markup=False, soft_wrap=True)


class Reporter:
    """Gathers steps and writes a line every `log` call. One a run, on the first process."""

    def __init__(self, output: Path, recipe: AnyRecipe, on_step: Callable[[dict[str, Any]], None] | None):
        self.console = Console(stderr=True)
        self.recipe, self.output, self.on_step = recipe, output, on_step
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "recipe.yaml", recipe_text(recipe))
        for log in (output / "metrics.jsonl", output / LOADS):
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
        self._clear()
        absent = [what for module, what in MONITORS.items() if not is_installed(module)]
        if absent:
            self.say(f"Not recorded, as not installed: {', '.join(absent)} ({install_command('monitor')}).")

    def _clear(self) -> None:
        self.losses: Losses = []
        self.seconds, self.flops, self.positions, self.filled, self.steps = 0.0, 0.0, 0.0, 0.0, 0
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        say(text, self.console)

    def start(self, step: int, peak: float) -> None:
        self.peak = peak
        if self.console.is_terminal:
            self.bar.start()
        self.bar.update(self.row, completed=step)
        self._clear()

    def step(
        self,
        step: int,
        losses: Losses,
        rate: float,
        norm: float,
        seconds: float,
        *,
        flops: float,
        positions: float,
        filled: float,
    ) -> None:
        self.number, self.rate, self.norm = step, rate, norm
        self.losses += losses
        self.seconds += seconds
        self.flops += flops
        self.positions += positions
        self.filled += filled
        self.steps += 1
        self.taken += 1
        left = self.recipe.train.steps - step
        if self.taken == 2 and left * seconds > LONG:  # the first step makes buffers, and takes longer
            self.say(f"{left:,} steps of {seconds:.2f} s are left: about {timedelta(seconds=round(left * seconds))}.")
        self.bar.update(self.row, completed=step)

    def log(self, energy: EnergyMeter, loads: Mapping[str, Any]) -> None:
        """One line for the steps since the last one. Times include waiting for data.

        `loads` (ExpertLoads.statistics) goes to experts.jsonl, its means over the layers here too."""
        elapsed = time.perf_counter() - self.since
        use, memory = energy.read(), peak_memory()
        line: dict[str, Any] = {
            "step": self.number,
            "loss": _mean(self.losses),
            "loss_by_task": _means(self.losses, 0),
            "loss_by_source": _means(self.losses, 1),
            "learning_rate": self.rate,
            "gradient_norm": self.norm,
            "seconds_per_step": elapsed / self.steps,
            "tokens_per_second": self.positions / elapsed,
            "tflops": self.flops / elapsed / 1e12,
            "share_of_peak": self.flops / elapsed / self.peak,
            "row_fill": self.filled / self.steps,
            "waiting_for_data": max(0.0, 1 - self.seconds / elapsed),
            "peak_memory_bytes": memory,
        }
        if use:
            line |= {"energy_kwh": use.kwh, "energy_measured": use.measured}
        if loads:
            line |= {key: sum(loads[key]) / len(loads[key]) for key in ("load_variation", "load_dropped")}
            with (self.output / LOADS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.number, **loads}) + "\n")
        self._write(line)
        scalars = {key: line[key] for key in SCALARS if key in line}
        for kind in ("loss_by_task", "loss_by_source"):
            scalars |= {f"{kind}/{name}": value for name, value in line[kind].items()}
        self._plot(scalars, self.number)
        figures = (
            f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  {line['share_of_peak']:.0%} of peak  "
            f"{memory / 2**30:.1f} GiB"
        )
        if use:
            figures += f"  {use.kwh * 1000:.1f} Wh ({_known(use)})"
        self.bar.update(self.row, figures=f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")
        every, steps = self.recipe.train.log_every, self.recipe.train.steps
        shown = self.number <= every or self.number % (10 * every) == 0 or self.number == steps
        if shown and not self.console.is_terminal:
            left = timedelta(seconds=round((steps - self.number) * line["seconds_per_step"]))
            self.say(f"step {self.number}/{steps}  {figures}  {line['seconds_per_step']:.2f} s/step  {left} left")
        self._clear()

    def evaluation(self, step: int, name: str, scores: Mapping[str, float]) -> None:
        self._write({"step": step, "evaluation": name, **scores})
        self._plot({f"evaluation/{name}/{metric}": value for metric, value in scores.items()}, step)
        self.say(f"step {step}  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        self.since = time.perf_counter()

    def finish(self, step: int, use: EnergyUse | None, examples: int, cut: int) -> None:
        """The last lines of a run, which saw so many `examples`; `cut` of them were longer than the model takes."""
        skipped = count_rejected(self.output)
        line: dict[str, Any] = {
            "step": step,
            "finished": True,
            "examples": examples,
            "cut": cut,
            "skipped_records": skipped,
        }
        told = ""
        if use:
            line |= {"energy_kwh": use.kwh, "co2e_kg": use.co2e_kg, "energy_measured": use.measured}
            told = (
                f"; {use.kwh * 1000:.1f} Wh, {use.co2e_kg * 1000:.1f} g CO2e "
                f"({self.recipe.train.country}; {_known(use)})"
            )
        self._write(line)
        if (self.output / LOADS).is_file() and is_installed("matplotlib"):
            draw_loads(self.output / LOADS, self.output / "experts.png")
        self._stop_bar()  # which would be drawn over the last line
        self.say(f"Trained {step} steps{told}. Model: {self.output / 'model'}")
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


def _known(use: EnergyUse) -> str:
    return f"{use.measured:.0%} measured" if use.measured else "estimated"


def _mean(losses: Losses) -> float:
    return sum(loss for *_, loss, _ in losses) / max(1, sum(number for *_, number in losses))


def _means(losses: Losses, key: int) -> dict[str, float]:
    groups: dict[str, Losses] = defaultdict(list)
    for entry in losses:
        groups[str(entry[key])].append(entry)
    return {name: _mean(group) for name, group in sorted(groups.items())}

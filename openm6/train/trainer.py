"""The one training loop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from openm6.core.energy import EnergyMeter, EnergyUse
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import lock_output
from openm6.model.precision import fast_dtype, peak_flops
from openm6.tasks.metrics import gain
from openm6.train.checkpoint import Checkpoints, consolidate, step_name, step_of
from openm6.train.codec import CodecObjective
from openm6.train.distributed import Group, process_group
from openm6.train.expert_statistics import ExpertStatistics, balance_loss
from openm6.train.objective import Objective
from openm6.train.optimizer import make_optimizers, rate_at, set_rate
from openm6.train.parallel import Parallel
from openm6.train.recipe import AnyRecipe, CodecRecipe, Recipe, recipe_text
from openm6.train.report import Losses, Reporter, Step, say
from openm6.train.resume import RECIPE, check_resumption
from openm6.train.sequences import SequenceObjective
from openm6.train.setup import TOKENIZER
from openm6.train.start import start_at_random, start_from

COUNTERS = ("smooth", "best", "seen", "cut", "score", "waited")
"""Attributes of a Trainer that its checkpoints keep, beside the step."""

DIVERGED = 3.0
"""Nats above its best at which the smoothed loss stops the run."""


def train(recipe: AnyRecipe, on_step: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Train, or resume an interrupted run of the same output directory.

    Returns the model directory, `output/model`; a finished run is not changed. `on_step` gets each logged line. Raises
    UsageError where the run in the output directory cannot be resumed (train/resume.py), or another process is training
    into it."""
    with process_group() as group, lock_output(recipe.output) if group.first else nullcontext():
        found = check_resumption(recipe) if group.first else None
        finished = group.sum(torch.tensor(float(found is not None and found.finished), device=group.device))
        for text in found.messages(recipe) if found else []:
            say(text)
        if finished:
            return recipe.output / "model"
        try:
            return Trainer(recipe, group, on_step, found.content if found else {}).run()
        except OpenM6Error:
            if group.first and not (recipe.output / RECIPE).exists():  # no step was taken: the run leaves nothing
                shutil.rmtree(recipe.output / TOKENIZER, ignore_errors=True)
                with suppress(OSError):  # there is something else
                    recipe.output.rmdir()
            raise


def seconds_per_step(recipe: AnyRecipe) -> float:
    """Seconds of a step of the recipe on this machine, by its first three steps, in a temporary folder. Evaluations and
    checkpoints are not counted.

    Raises what a training would, and UsageError for a recipe whose teacher has to answer all records first."""
    if isinstance(recipe, Recipe) and any(section.answers == "teacher" for section in recipe.data):
        raise UsageError("The teacher of this recipe answers records before the first step: it cannot be timed.")
    with process_group() as group, TemporaryDirectory() as folder:
        trainer = Trainer(recipe.model_copy(update={"output": Path(folder) / "run"}), group)
        try:
            trainer._resume()
            times = []
            with closing(iter(trainer.loader)) as batches:  # its threads write into the folder
                for _ in range(3):
                    started = time.perf_counter()
                    trainer._one_step(next(batches))
                    times.append(time.perf_counter() - started)
        finally:
            trainer.energy.stop()
    return min(times[1:])  # the first step makes buffers and optimizer states


class Trainer:
    """A run: its model, data, optimizer and state. One instance per process."""

    def __init__(
        self,
        recipe: AnyRecipe,
        group: Group,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        content: Mapping[str, str] | None = None,
    ):
        """`content`: hashes of what the recipe names (Resumption), kept in the checkpoints."""
        self.recipe, self.settings, self.group = recipe, recipe.train, group
        self.output, self.on_step, self.content = recipe.output, on_step, dict(content or {})
        self.reporter: Reporter | None = None  # from when all has been checked: it writes
        torch.manual_seed(recipe.seed)
        self.objective: Objective = (
            CodecObjective(recipe, group) if isinstance(recipe, CodecRecipe) else SequenceObjective(recipe, group)
        )
        self.loader = self.objective.loader
        kinds = dict.fromkeys((entry.task.name, entry.name) for entry in self.loader.entries)
        self.kinds = {kind: number for number, kind in enumerate(kinds)}
        chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}
        self.dtype = chosen.get(self.settings.precision) or fast_dtype(group.device.type)
        self.checkpoints = Checkpoints(self.output / "checkpoints", self.settings.keep, group)
        self.energy = EnergyMeter(self.settings.country)
        self.step, self.smooth, self.best, self.seen, self.cut = 0, math.nan, math.inf, 0, 0
        self.score, self.waited = -math.inf, 0  # of the best measure, and how many came after it

    def _build(self, shared: bool) -> None:
        """Construct the distributed network, its weights still to be filled, and its optimizers; `shared`: in the
        Pseudo stage of Pseudo-to-Real."""
        self.shared = shared
        self.model: Any = self.objective.network(shared).train()
        if self.settings.compile:
            for block in getattr(self.model, "blocks", []):
                block.compile()
        self.parallel = Parallel(self.model, self.recipe.parallel, self.group, self.dtype)
        self.parallel.allocate()
        self.optimizers = make_optimizers(self.model, self.settings)
        self.expert_statistics = ExpertStatistics(self.model, self.group)

    def run(self) -> Path:
        try:
            resumed = self._resume()
            if self.group.first:
                self.reporter = Reporter(self.output, self.recipe, self.on_step)
            if resumed and self.reporter:
                self.reporter.say(f"Resuming from step {self.step} ({resumed}).")
            batches = iter(self.loader)
            if self.reporter:
                for note in self.objective.notes:
                    self.reporter.say(note)
                peak = peak_flops(self.group.device.type, self.dtype) * self.group.world
                self.reporter.start(self.step, peak)
            while self.step < self.settings.steps and not self._out_of_patience():
                if self.shared and self.recipe.pseudo and self.step == self.recipe.pseudo.steps:
                    self._delink()
                self._one_step(next(batches))
                self._log_evaluate_save()
            self._finish()
        finally:
            with suppress(OpenM6Error):
                self.checkpoints.wait()
            if self.reporter:
                self.reporter.close()
        return self.output / "model"

    def _one_step(self, examples: list[Any]) -> None:
        started = time.perf_counter()
        # A trained position weighs the same on every process and in every micro-batch.
        counts = torch.tensor(self.objective.loss_weight(examples), dtype=torch.float64, device=self.group.device)
        total, positions_in_step, cut = self.group.sum(counts).tolist()
        if total == 0:
            raise OpenM6Error(f"No example of step {self.step} has anything to learn: are the target texts empty?")
        losses: Losses = []
        flops, positions, padded = 0.0, 0.0, 0.0
        self.expert_statistics.start_step()
        accumulate = min(self.settings.accumulate, len(examples))
        rounds = [examples[i::accumulate] for i in range(accumulate)]
        batches = [batch for some in rounds for batch in self.objective.micro_batches(some)]
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                self.parallel.synchronize(last)
                result = self.objective.micro_batch_loss(self.parallel.run, batch)
            loss = result.loss / total + balance_loss(result.router_statistics) / positions_in_step
            (loss * self.parallel.scale).backward()
            self.expert_statistics.add(result.router_statistics, more=not last)
            losses += result.losses
            flops, positions = flops + result.flops, positions + result.positions
            padded += result.padded_positions
        self.expert_statistics.finish_step()
        norm = self.parallel.clip(self.settings.clip)
        if not bool(torch.isfinite(norm)):
            self._stop("the gradient is not finite (NaN or infinite)")
        rate = rate_at(self.step, self.settings, self.recipe.pseudo)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                set_rate(group, group["peak_lr"] * rate)
        self.parallel.update(self.optimizers)
        self.step += 1
        self.seen += self.settings.batch_size
        self.cut += int(cut)
        losses, (flops, positions, padded) = self._sum_over_processes(losses, [flops, positions, padded])
        self._track(losses)
        if self.reporter:
            rate, seconds = rate * self.settings.learning_rate, time.perf_counter() - started
            self.reporter.step(
                Step(self.step, losses, rate, float(norm), seconds, flops, positions, positions / padded)
            )

    def _sum_over_processes(self, losses: Losses, counts: list[float]) -> tuple[Losses, list[float]]:
        """The losses of all processes by task and source, and the sums of `counts`."""
        table = torch.zeros(len(self.kinds) + 1, len(counts), dtype=torch.float64)
        for task, origin, loss, number in losses:
            table[self.kinds[task, origin], :2] += torch.tensor([loss, number], dtype=torch.float64)
        table[-1] = torch.tensor(counts, dtype=torch.float64)
        rows = self.group.sum(table.to(self.group.device)).tolist()
        return [(*kind, row[0], int(row[1])) for kind, row in zip(self.kinds, rows, strict=False) if row[1]], rows[-1]

    def _track(self, losses: Losses) -> None:
        """Update the smoothed loss, and stop the run when it diverges. It starts anew when a source joins."""
        if self.step - 1 in {entry.start for entry in self.loader.entries}:
            self.smooth, self.best = math.nan, math.inf
        loss = sum(loss for *_, loss, _ in losses) / sum(number for *_, number in losses)
        self.smooth = loss if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        self.best = min(self.best, self.smooth)
        if self.smooth > self.best + DIVERGED:
            self._stop(f"the loss has risen from {self.best:.2f} to {self.smooth:.2f}")

    def _stop(self, reason: str) -> None:
        self.checkpoints.wait()
        last = self.checkpoints.latest()
        kept = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
        raise OpenM6Error(
            f"Training diverged at step {self.step}: {reason}. {kept} "
            "Try a lower train.learning_rate or a longer train.warmup."
        )

    def _log_evaluate_save(self) -> None:
        settings, evaluation = self.settings, self.recipe.evaluation
        stops = evaluation.patience is not None
        measures = bool(evaluation.data) and (
            self.step % evaluation.every == 0 if self.step < settings.steps else stops
        )
        # Before a measure too: it may be the end, and its time is not that of the steps.
        if self.reporter and (measures or self.step % settings.log_every == 0 or self.step == settings.steps):
            self.reporter.log(self.energy, self.expert_statistics.statistics())
            self.expert_statistics.clear()
        better = measures and self._evaluate() and stops
        last = self.step == settings.steps or self._out_of_patience()
        if better or last or self.step % settings.checkpoint_every == 0:
            self._save()

    def _evaluate(self) -> bool:
        """Evaluate; True where the first metric of the first source is the best so far."""
        found = torch.zeros(1, dtype=torch.float64, device=self.group.device)
        if self.group.first or self.parallel.sharded:  # whose parts all have to work
            for number, (name, scores) in enumerate(self.objective.evaluate(self.model)):
                if self.reporter:
                    self.reporter.evaluation(self.step, name, scores)
                if self.group.first and number == 0:
                    metric, value = next(iter(scores.items()))
                    found[0] = gain(metric, value)
            self.model.train()
        self.group.wait()
        score = float(self.group.sum(found)[0])
        better = score > self.score
        self.score, self.waited = (score, 0) if better else (self.score, self.waited + 1)
        if better:
            self.checkpoints.best = self.step if self.recipe.evaluation.patience else None
        return better

    def _out_of_patience(self) -> bool:
        patience = self.recipe.evaluation.patience
        return patience is not None and self.waited >= patience

    def _save(self) -> None:
        self.objective.gather()
        use = self.energy.read()
        # Every process is at the same step, so the first one's place in the data is everyone's.
        state = {name: getattr(self, name) for name in COUNTERS} | {
            "data": self.loader.get_state(), "best_step": self.checkpoints.best, "content": self.content,
            "energy": use and asdict(use),
        }  # fmt: skip
        self.checkpoints.save(self.step, self._describe, self.model, self.optimizers, state)

    def _describe(self, path: Path) -> None:
        self.objective.describe(path)
        (path / RECIPE).write_text(recipe_text(self.recipe), "utf-8")

    def _delink(self) -> None:
        """Give every layer its own copy of the shared weights, as a resumed run does at this step."""
        if self.step % self.settings.checkpoint_every:
            self._save()
        self.checkpoints.wait()
        self.group.wait()
        self._load(self.checkpoints.directory / step_name(self.step))
        if self.reporter:
            self.reporter.say(f"Step {self.step}: the layers no longer share weights.")

    def _load(self, path: Path) -> dict[str, Any]:
        """Load network and optimizers from a checkpoint; the last one of the Pseudo stage is delinked."""
        pseudo, step = self.recipe.pseudo, step_of(path)
        self._build(shared=pseudo is not None and step < pseudo.steps)
        if self.recipe.adapt and self.objective.path:  # of what stays as it is no checkpoint was made
            start_from(self.model, self.objective.path, self.recipe.seed)
        delinked: dict[str, Any] = (
            {"shared": pseudo.layers, "moments": pseudo.moments} if pseudo and step == pseudo.steps else {}
        )
        return self.checkpoints.restore(path, self.model, self.optimizers, self.parallel.update, **delinked)

    def _resume(self) -> Path | None:
        """Load the newest checkpoint and return its path, or initialize a new run and return None."""
        latest = self.checkpoints.latest()
        if latest is None:
            self._build(shared=self.recipe.pseudo is not None)
            if self.objective.path:
                start_from(self.model, self.objective.path, self.recipe.seed)
            else:
                start_at_random(self.model, self.recipe.seed)
            self.objective.initialize(self.model)
            return None
        state = self._load(latest)
        self.loader.set_state(state["data"])
        for name in ("step", *COUNTERS):
            setattr(self, name, state[name])
        self.checkpoints.best = state["best_step"]
        spent = state["energy"]
        self.energy.before = None if spent is None else EnergyUse(**spent)
        return latest

    def _finish(self) -> None:
        best = self.checkpoints.best
        if self.recipe.evaluation.data and self.recipe.evaluation.patience is None:
            self._evaluate()
        self.checkpoints.wait()
        if self.group.first and self.reporter:
            chosen = self.checkpoints.latest() if best is None else self.checkpoints.directory / step_name(best)
            assert chosen is not None
            if best is not None:
                self.reporter.say(f"The best measure was that of step {best}: its weights are the model.")
            consolidate(chosen, self.output / "model")
            self.reporter.finish(self.step, self.energy.stop(), self.seen, self.cut)

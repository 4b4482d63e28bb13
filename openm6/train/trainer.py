"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openm6.atomic import write_whole
from openm6.data.loader import Loader
from openm6.errors import OpenM6Error
from openm6.model.precision import fast_dtype
from openm6.sequence import IGNORE, Batch, Sequence, pack, pad
from openm6.train.checkpoint import Checkpoints
from openm6.train.distributed import Group, process_group
from openm6.train.meters import EnergyMeter, peak_flops, training_flops
from openm6.train.optimizer import make_optimizers, rate_at
from openm6.train.recipe import Recipe
from openm6.train.report import Losses, Reporter
from openm6.train.setup import build_bundle, build_entries, evaluate_entries

DIVERGED = 3.0
"""Nats by which the smoothed loss may rise above its best before the run is stopped."""


def train(recipe: Recipe, on_step: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Train, or go on where an interrupted run of the same output directory stopped.

    Returns the model directory, `output/model`. `on_step` gets each logged line.
    """
    with process_group() as group:
        return Trainer(recipe, group, on_step).run()


class Trainer:
    """A run: its model, data, optimizer, and where it is. One instance a process."""

    def __init__(self, recipe: Recipe, group: Group, on_step: Callable[[dict[str, Any]], None] | None = None):
        self.recipe, self.settings, self.group = recipe, recipe.train, group
        self.output = recipe.output
        self.output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.bundle = build_bundle(recipe, group)
        self.entries, rejects = build_entries(recipe, self.bundle, group)
        self.loader = Loader(
            self.entries,
            self.bundle.processor,
            self.settings.batch_size,
            seed=recipe.seed,
            rank=group.rank,
            world=group.world,
            threads=self.settings.workers,
            rejects=rejects,
        )
        self.bundle.tasks |= {entry.task.name: entry.task for entry in self.entries}
        self.kinds = {kind: i for i, kind in enumerate(dict.fromkeys((e.task.name, e.name) for e in self.entries))}
        self.model = self.bundle.model.train()
        self.model.to(group.device)  # type: ignore[arg-type]
        if self.settings.compile:
            for block in self.model.blocks:
                block.compile()
        self.runner: nn.Module = self.model
        if group.world > 1:
            self.runner = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}
        self.dtype = chosen.get(self.settings.precision) or fast_dtype(group.device.type)
        self.optimizers = make_optimizers(self.model, self.settings)
        self.checkpoints = Checkpoints(self.output / "checkpoints", self.settings.keep)
        self.energy = EnergyMeter()
        self.reporter = Reporter(self.output, recipe, on_step) if group.first else None
        self.step, self.smooth, self.best, self.seen = 0, math.nan, math.inf, 0

    def run(self) -> Path:
        try:
            self._resume()
            batches = iter(self.loader)
            if self.reporter:
                peak = peak_flops(self.group.device.type, self.dtype) * self.group.world
                self.reporter.start(self.step, peak)
            while self.step < self.settings.steps:
                self._one_step(next(batches))
                self._now_and_then()
            self._finish()
        finally:
            if self.reporter:
                self.reporter.close()
        return self.output / "model"

    def _one_step(self, sequences: list[Sequence]) -> None:
        started = time.perf_counter()
        # Every trained position of the step weighs the same, in whatever process and part it falls.
        trained = torch.tensor([sum(int((s.labels != IGNORE).sum()) for s in sequences)], device=self.group.device)
        total = int(self.group.sum(trained))
        if total == 0:
            raise OpenM6Error(f"No example of step {self.step} has anything to learn: are the target texts empty?")
        losses: Losses = []
        flops, positions, padded = 0.0, 0.0, 0.0
        parts = [sequences[i :: self.settings.accumulate] for i in range(self.settings.accumulate)]
        for number, part in enumerate(parts):
            batch = self._batch(part)
            last = number == len(parts) - 1
            with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                self._sync_gradients(last)
                output = self.runner(batch)
            # Data-parallel reduction takes the mean over the processes: times world makes it the sum.
            loss = output.hidden.sum() * 0.0 if output.loss is None else output.loss / total * self.group.world
            loss.backward()
            losses += _by_example(output, batch)
            lengths = torch.bincount(batch.segments.flatten())[1:].double()
            positions += int(lengths.sum())
            padded += batch.ids.numel()
            pairs = float((lengths**2).sum() / 2)
            flops += training_flops(
                self.model.config, int(lengths.sum()), int(pairs), int((batch.labels != IGNORE).sum())
            )
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._check(norm)
        share = rate_at(self.step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.seen += self.settings.batch_size
        losses, (flops, positions, padded) = self._everywhere(losses, [flops, positions, padded])
        self._track(losses, total)
        if self.reporter:
            self.reporter.step(
                self.step, losses, share * self.settings.learning_rate, float(norm), time.perf_counter() - started,
                flops=flops, positions=positions, filled=positions / padded,
            )  # fmt: skip

    def _everywhere(self, losses: Losses, counts: list[float]) -> tuple[Losses, list[float]]:
        """The losses of all processes by task and source, and the sums of `counts`."""
        table = torch.zeros(len(self.kinds) + 1, max(2, len(counts)), dtype=torch.float64)
        for task, origin, loss, number in losses:
            table[self.kinds[task, origin], :2] += torch.tensor([loss, number], dtype=torch.float64)
        table[-1, : len(counts)] = torch.tensor(counts, dtype=torch.float64)
        rows = self.group.sum(table.to(self.group.device)).tolist()
        return [(*kind, row[0], int(row[1])) for kind, row in zip(self.kinds, rows, strict=False) if row[1]], rows[-1]

    def _batch(self, sequences: list[Sequence]) -> Batch:
        pad_id, on_cpu = self.bundle.processor.tokenizer.pad_id, self.group.device.type == "cpu"
        if not self.settings.packing:
            return pad(sequences, pad_id).to(self.group.device)
        # A GPU wants few shapes: its kernels are compiled and its memory is cut for each.
        return pack(sequences, self.settings.row_length, pad_id, even=on_cpu).to(self.group.device)

    def _sync_gradients(self, last: bool) -> None:
        """With accumulation, gradients are exchanged once, with the last part."""
        if self.group.world > 1:
            self.runner.require_backward_grad_sync = last  # type: ignore[assignment]

    def _check(self, norm: Tensor) -> None:
        if not bool(torch.isfinite(norm)):
            self._stop("the gradient is not finite (NaN or infinite)")

    def _track(self, losses: Losses, total: int) -> None:
        """Keep the smoothed loss, and stop when it has run away. A source that joins may raise it: it starts anew."""
        if self.step - 1 in {entry.start for entry in self.entries}:
            self.smooth, self.best = math.nan, math.inf
        loss = sum(loss for *_, loss, _ in losses) / total
        self.smooth = loss if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        self.best = min(self.best, self.smooth)
        if self.smooth > self.best + DIVERGED:
            self._stop(f"the loss has risen from {self.best:.2f} to {self.smooth:.2f}")

    def _stop(self, reason: str) -> None:
        last = self.checkpoints.latest()
        kept = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
        raise OpenM6Error(
            f"Training diverged at step {self.step}: {reason}. {kept} "
            "Try a lower train.learning_rate or a longer train.warmup."
        )

    def _now_and_then(self) -> None:
        settings, evaluation = self.settings, self.recipe.evaluation
        if self.step % settings.log_every == 0 and self.reporter:
            self.reporter.log(self.energy)
        if evaluation.data and (self.step % evaluation.every == 0) and self.step < settings.steps:
            self._evaluate()
        if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
            self._save()

    def _evaluate(self) -> None:
        if self.group.first and self.reporter:
            self.model.eval()
            for name, scores in evaluate_entries(self.recipe, self.bundle):
                self.reporter.evaluation(self.step, name, scores)
            self.model.train()
        self.group.wait()

    def _save(self) -> None:
        # Every process is at the same step, so the first one's place in the data is everyone's.
        if self.group.first:
            state = {"data": self.loader.get_state(), "smooth": self.smooth, "best": self.best, "seen": self.seen}
            self.checkpoints.save(self.step, self.bundle.save, self.optimizers, state)
        self.group.wait()

    def _resume(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            return
        state = self.checkpoints.restore(latest, self.model, self.optimizers)
        self.loader.set_state(state["data"])
        self.step, self.seen = state["step"], state["seen"]
        self.smooth, self.best = state["smooth"], state["best"]
        if self.reporter:
            self.reporter.say(f"Going on from step {self.step} ({latest}).")

    def _finish(self) -> None:
        if self.recipe.evaluation.data:
            self._evaluate()
        if self.group.first and self.reporter:
            write_whole(self.output / "model", self.bundle.save)
            self.reporter.finish(self.step, self.energy.stop())


def _by_example(output: Any, batch: Batch) -> Losses:
    """(task, origin, sum of losses, positions) of every example that was trained."""
    if output.losses is None:
        return []
    count = len(batch.tasks)
    segments = output.segments - 1
    sums = torch.zeros(count, dtype=torch.float64, device=segments.device).index_add_(
        0, segments, output.losses.double()
    )
    numbers = torch.bincount(segments, minlength=count)
    return [
        (task, origin, value, number)
        for task, origin, value, number in zip(batch.tasks, batch.origins, sums.tolist(), numbers.tolist(), strict=True)
        if number
    ]

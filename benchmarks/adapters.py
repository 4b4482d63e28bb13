"""Accuracy of each adapter relative to full fine-tuning, and its number of weights: the same model, data and steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file

from benchmarks.common import ROOT, require_model
from openm6.evaluate.command import measure
from openm6.inference.session import Session
from openm6.model.adapters import WEIGHTS
from openm6.train.finetune import FULL, RATES, finetune_recipe
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

TITLE = "Adapters against full fine-tuning"
STEPS, ASKED, SEEDS = 300, 300, 3
Task = tuple[str, str, str, dict[str, str]]
"""Task, data, metric, columns."""
TASKS: tuple[Task, ...] = (
    ("text_classification", "market:reviews", "accuracy", {}),
    ("product_copy", "market:copy", "bleu", {}),
)
RANK = 4


def run(
    root: Path = ROOT, tasks: tuple[Task, ...] = TASKS, steps: int = STEPS, asked: int = ASKED, seeds: int = SEEDS
) -> tuple[list[dict[str, Any]], str]:
    base = root / "market" / "model"
    require_model(base, "run `make demo`, then `openm6 train market`")
    total = sum(p.numel() for p in Session.load(base, "meta", trainable=True).model.parameters())
    rows: list[dict[str, Any]] = []
    for task, data, metric, columns in tasks:
        full = 0.0
        others = [m for m in RATES if m not in (FULL, "lora")] if task == tasks[0][0] else []
        for method in (FULL, "lora", *others):
            figures, trained = [], 0
            for seed in range(seeds if method in (FULL, "lora") else 1):
                model = _learned(root / "bench-adapters", base, task, data, columns, method, seed, steps)
                session, trained = Session.load(model), total if method == FULL else _weights(model)
                found = measure(session, task, f"{data}/test", columns, limit=asked)
                figures.append(found.scores[metric].value)
            full = full or median(figures)
            rows.append(
                {
                    "task": task, "method": method, "trained": f"{trained / total:.2%}",
                    "metric": metric, "value": round(median(figures), 4),
                    "by seed": ", ".join(f"{figure:.4f}" for figure in figures),
                    "of full": f"{median(figures) / full:.1%}" if full else "",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    note = (
        f"From the demo's model after `openm6 train market` ({total:,} weights); {steps} steps of 32, {asked} held-out "
        f"records; full and LoRA (rank {RANK}): the median of {seeds} seeds; the others: one, of the first task."
    )
    return rows, note


def _learned(
    place: Path, base: Path, task: str, data: str, columns: dict[str, str], method: str, seed: int, steps: int
) -> Path:
    folder = place / f"{task}-{method}-{seed}"
    if (folder / "model").is_dir():
        return folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    values = finetune_recipe(
        base, task, [f"{data}/train"], method, output=folder, steps=steps, columns=columns, seed=seed
    )
    values["train"] |= {"workers": 0, "checkpoint_every": steps}
    if method == "lora":
        values["adapt"]["rank"] = RANK
    return train(check_recipe(values))


def _weights(adapter: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values())

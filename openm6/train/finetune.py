"""The recipe of a fine-tuning, from model, task, data and method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openm6.core.errors import UsageError, suggest
from openm6.tasks.card import read_card

FULL = "full"

RATES: dict[str, dict[str, Any]] = {
    FULL: {"optimizer": "muon", "learning_rate": 1e-3, "matrix_learning_rate": 2e-3},
    "lora": {"learning_rate": 5e-3}, "ia3": {"learning_rate": 3e-2}, "bottleneck": {"learning_rate": 5e-3},
    "prompt": {"learning_rate": 1e-1}, "prefix": {"learning_rate": 3e-2}, "head": {"learning_rate": 3e-3},
}  # fmt: skip
"""Training settings of each method, unless a recipe gives others."""

MEASURES, PATIENCE = 10, 3
"""With validation data: evaluations in a run, and evaluations without improvement before it stops."""


def finetune_recipe(
    model: Path,
    task: str,
    data: list[str],
    method: str = FULL,
    *,
    output: Path | None = None,
    validation: str | None = None,
    steps: int = 500,
    batch_size: int = 32,
    columns: Mapping[str, str] | None = None,
    noise: float = 0.0,
    label_smoothing: float = 0.0,
    teacher: Path | None = None,
    unlabelled: Iterable[str] = (),
    seed: int = 0,
    data_format: str | None = None,
    images: str | None = None,
) -> dict[str, Any]:
    """The values of a recipe that teaches `model` a task (by name or YAML path) from sources.

    With `validation`, a source, it stops when measures get no better and keeps the best weights; with a `teacher`, a
    model directory, it learns from that one's answers beside the labels, and from its answers alone to sources that are
    `unlabelled`. Raises UsageError for an unknown method, or where there is no model.
    """
    if method not in RATES:
        raise UsageError(f"There is no method {method}.{suggest(method, list(RATES))} There are: {', '.join(RATES)}.")
    _, longest, _ = read_card(model)
    name = "instruction" if "->" in task else Path(task).stem
    common: dict[str, Any] = {"task": task, "columns": dict(columns or {})}
    common |= {key: value for key, value in (("format", data_format), ("images", images)) if value}
    sections = [{"source": source, **common, "noise": noise} for source in data]
    sections += [{"source": source, **common, "answers": "teacher"} for source in unlabelled]
    if not sections:
        raise UsageError("Say what to learn from, by --data.")
    every = max(1, steps // MEASURES)
    values: dict[str, Any] = {
        "name": f"{name} {method}",
        "seed": seed,
        "output": str(output or Path("runs") / f"finetune-{name}"),
        "model": {"path": str(model)},
        "data": sections,
        "train": {
            "steps": steps, "batch_size": batch_size, "row_length": longest, "warmup": max(1, steps // 20),
            "weight_decay": 0.01, "label_smoothing": label_smoothing, "checkpoint_every": every, **RATES[method],
        },
    }  # fmt: skip
    if method != FULL:
        values["adapt"] = {"method": method}
    if teacher:
        values["distill"] = {"teacher": str(teacher)}
    if validation:
        measured = {"source": validation, **common}
        values["evaluation"] = {"every": every, "patience": PATIENCE, "data": [measured]}
    return values

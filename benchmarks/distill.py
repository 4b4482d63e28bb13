"""Students of a `small` teacher, each with it and without, and what of its accuracy they keep.

    runs/small/model    openm6 train demo with model.preset=small, and model.sizes.image_max_patches=16

    python -m benchmarks distill

All students at once on a GPU, one after the other on a CPU (hours). They are kept beside the teacher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import require_model
from openm6.compress.convert import prune_model
from openm6.evaluate.command import measure
from openm6.inference.session import Session
from openm6.model.count import count_parameters
from openm6.train.finetune import finetune_recipe
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

TRAIN, TEST = "demo:questions/train", "demo:questions/test"
RECORDS = 2000
TEACHER = Path("runs/small/model")
PRUNED: dict[str, dict[str, int]] = {
    "4 layers, width 448": {"layers": 4, "width": 448},
    "2 layers, width 256": {"layers": 2, "width": 256, "key_value_heads": 2},
}
STEPS, RATE = 600, 5e-4
SEEDS = (0, 1, 2)
TAUGHT, ALONE = "with its teacher", "without"
TITLE = "Students with and without their teacher"

Row = dict[str, Any]


def run() -> tuple[list[Row], str]:
    require_model(TEACHER, f"see the head of {Path(__file__).name}")
    waiting = [("the teacher", "", "", TEACHER)]
    for name, sizes in PRUNED.items():
        pruned = TEACHER.parent / f"pruned-{sizes['layers']}"
        if not pruned.is_dir():
            prune_model(TEACHER, pruned, "vqa", TRAIN, {}, 96, **sizes)
        waiting.append((name, "pruned alone", "", pruned))
        waiting += [(name, side, str(seed), pruned) for seed in SEEDS for side in (TAUGHT, ALONE)]
    found = [(name, side, seed, told) for (name, side, seed, _), told in zip(waiting, _students(waiting), strict=True)]
    teacher = found[0][-1]
    rows = [_row(*one, teacher) for one in found]
    note = (
        f"Pruned students of the teacher, trained on for {STEPS} steps of 32 questions, with the same rates with and "
        f"without it; accuracy on {RECORDS} questions of the test split, of combinations that no model has seen; "
        "medians of the seeds first."
    )
    return [rows[0], *_medians(rows), *rows[1:]], note


def _students(waiting: list[tuple[str, str, str, Path]]) -> list[dict[str, float]]:
    every = len(waiting) if torch.cuda.is_available() else 1
    found = []
    for first in range(0, len(waiting), every):
        running = [_started(*one) for one in waiting[first : first + every]]
        for process, one in zip(running, waiting[first : first + every], strict=True):
            found.append(json.loads(process.communicate()[0].strip().splitlines()[-1]))
            print(*one[:3], found[-1], flush=True)
    return found


def _started(name: str, side: str, seed: str, pruned: Path) -> subprocess.Popen[str]:
    output = pruned.parent / f"{pruned.name}-{'taught' if side == TAUGHT else 'alone'}-{seed}"
    words = [sys.executable, "-m", "benchmarks.distill", str(output), str(pruned), seed or "0", str(RATE)]
    words += [str(STEPS if seed else 0), *([str(TEACHER)] if side == TAUGHT else [])]
    threads = {"OMP_NUM_THREADS": "1"} if torch.cuda.is_available() else {}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})


def _row(name: str, side: str, seed: str, found: dict[str, float], teacher: dict[str, float]) -> Row:
    return {
        "student": name, "trained": side, "seed": seed, "parameters (M)": round(found["parameters"] / 1e6, 2),
        "of the teacher's": round(found["parameters"] / teacher["parameters"], 3),
        "VQA %": round(100 * found["accuracy"], 2),
        "of its accuracy %": round(100 * found["accuracy"] / teacher["accuracy"], 2),
    }  # fmt: skip


def _medians(rows: list[Row]) -> list[Row]:
    found = []
    for name in PRUNED:
        for side in (TAUGHT, ALONE):
            some = [row for row in rows if (row["student"], row["trained"]) == (name, side)]
            middle = {key: round(median(row[key] for row in some), 2) for key in ("VQA %", "of its accuracy %")}
            found.append({**some[0], "seed": "median", **middle})
    return found


def learn(output: Path, pruned: Path, seed: int, rate: float, steps: int, teacher: Path | None) -> None:
    """Train one student, and print its accuracy; with 0 steps that of `pruned`."""
    if steps and not (output / "model" / "config.json").is_file():  # kept by an earlier call
        values = finetune_recipe(
            pruned, "vqa", [TRAIN], output=output, steps=steps, batch_size=32, seed=seed, teacher=teacher
        )
        values["train"] |= {"learning_rate": rate, "matrix_learning_rate": 2 * rate, "checkpoint_every": steps}
        train(check_recipe(values))
    session = Session.load(output / "model" if steps else pruned)
    accuracy = next(iter(measure(session, "vqa", TEST, {}, limit=RECORDS).values().values()))
    print(json.dumps({"parameters": sum(count_parameters(session.model.config).values()), "accuracy": accuracy}))


if __name__ == "__main__":
    place, pruned_model, number, learning_rate, count, *from_teacher = sys.argv[1:]
    larger = Path(from_teacher[0]) if from_teacher else None
    learn(Path(place), Path(pruned_model), int(number), float(learning_rate), int(count), larger)

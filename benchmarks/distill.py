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

from benchmarks._student import RECORDS, TRAIN
from openm6.compress.convert import prune_model

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
    if not (TEACHER / "config.json").is_file():
        sys.exit(f"Train {TEACHER} first: see the head of {Path(__file__).name}.")
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
    words = [sys.executable, "-m", "benchmarks._student", str(output), str(pruned), seed or "0", str(RATE)]
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

"""An imported SmolLM2-135M-Instruct on a task of ours that it cannot do: before, after LoRA, and the same network from
random weights (all of them trained) with the same data and steps. Reviews of the invented market, three classes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, require_model
from openm6.inference.session import Session
from openm6.model import M6

TITLE = "Fine-tuning of SmolLM2-135M-Instruct on reviews in Chinese"
TRAIN, TEST = "market:reviews/train", "market:reviews/test"
TASK = """
description: 评论属于哪一类
instructions: ["[text:text] 这条评论属于哪一类?{ 可选: [choices|of=label]} -> [label:label]"]
labels: {label: [好评, 中评, 差评]}
metrics: [accuracy]
decode: {max_new_tokens: 16}
example: {text: 很好, label: 好评}
"""
STEPS, BATCH, LIMIT = 150, 8, 200


def run(root: Path = ROOT, steps: int = STEPS, limit: int = LIMIT) -> tuple[list[dict[str, Any]], str]:
    model = root / "smollm2"
    require_model(model, "import it as docs/open-models.md says")
    folder = root / "bench-open-finetune"
    random, task = folder / "random", folder / "reviews.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    task.write_text(TASK, "utf-8")
    if not random.is_dir():
        session = Session.load(model, trainable=True)
        Session(M6(session.model.config), session.processor).save(random)
    rows = [_row("SmolLM2, as imported", model, task, 0.0, limit)]
    for name, start, method in (("SmolLM2, LoRA", model, "lora"), ("random weights, all trained", random, "full")):
        output, begun = folder / method, time.perf_counter()
        _openm6(
            "finetune", start, "--task", task, "--data", TRAIN, "--method", method, "--steps", steps,
            "--batch-size", BATCH, "--output", output, "train.learning_rate=5e-4",
        )  # fmt: skip
        rows.append(_row(name, output / "model", task, time.perf_counter() - begun, limit))
        print(rows[-1], flush=True)
    note = f"{steps} steps of {BATCH} examples; the first {limit} records of the test split, which have three classes."
    return rows, note


def _row(name: str, model: Path, task: Path, seconds: float, limit: int) -> dict[str, Any]:
    found = json.loads(_openm6("eval", model, "--task", task, "--data", TEST, "--limit", limit, "--json"))
    return {
        "side": name,
        "accuracy": found["scores"]["accuracy"]["value"],
        "minutes of training": round(seconds / 60, 1),
    }


def _openm6(*arguments: object) -> str:
    command = [sys.executable, "-m", "openm6", *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout

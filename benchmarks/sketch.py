"""Texts from a sketch and edits in parallel (SANA) against one token after the other: the same model, 800 texts to
learn from, the same steps.

Quality: BLEU, PARENT against the item's table, and the facts that the text has, of those that the true one tells.
Speed: milliseconds a text, one at a time, both sides in turn.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import ROOT, race, require_model
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.tasks.faithful import facts_kept, parent
from openm6.tasks.metrics import bleu
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

TITLE = "Texts from a sketch, edited in parallel, against one token after the other"
LEARNED, ASKED, STEPS, SEEDS = 800, 200, 1200, 3

PAIRS = {
    "live": ("live_script", "live_script_edit", "script"),
    "facts": ("table_to_text", "table_to_text_edit", "text"),
}
"""Part of the market: the task one after the other, the one from a sketch, and the slot that is written."""


def run(
    root: Path = ROOT, parts: tuple[str, ...] = tuple(PAIRS), asked: int = ASKED, steps: int = STEPS, seeds: int = SEEDS
) -> tuple[list[dict[str, Any]], str]:
    base = root / "market" / "model"
    require_model(base, "run `make demo`, then `openm6 train market`")
    rows: list[dict[str, Any]] = []
    for part in parts:
        plain, edited, slot = PAIRS[part]
        figures: dict[str, list[dict[str, float]]] = {plain: [], edited: []}
        for seed in range(seeds):
            sessions = {
                task: _learned(root / "bench-sketch", base, part, task, seed, steps) for task in (plain, edited)
            }
            for task, session in sessions.items():
                figures[task].append(_measured(session, part, task, slot, asked))
            times = _timed(sessions, part)
            for task, ms in times.items():
                figures[task][-1]["ms"] = ms
        for task, found in figures.items():
            mid = {name: median(one[name] for one in found) for name in found[0]}
            rows.append(
                {
                    "data": f"market:{part}", "task": task, "BLEU": round(mid["bleu"], 1),
                    "BLEU by seed": ", ".join(f"{one['bleu']:.1f}" for one in found), "PARENT": round(mid["parent"], 3),
                    "facts kept": round(mid["facts"], 4), "ms a text": round(mid["ms"], 1),
                    "faster": round(median(one["ms"] for one in figures[plain]) / mid["ms"], 2),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    note = (
        f"{LEARNED} labelled texts, {steps} steps of 32 from the demo's model after `openm6 train market`, {asked} "
        f"held-out ones, {seeds} seeds (medians). Facts: values of the table that the true text names and the written "
        "one has, word for word."
    )
    return rows, note


def _learned(place: Path, base: Path, part: str, task: str, seed: int, steps: int) -> Session:
    folder = place / f"{task}-{seed}"
    if not (folder / "model").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        values = {
            "name": task, "seed": seed, "output": str(folder), "model": {"path": str(base)},
            "data": [{"source": f"market:{part}/train?records={LEARNED}&seed={seed}", "task": task}],
            "train": {
                "steps": steps, "batch_size": 32, "row_length": 256, "optimizer": "muon", "learning_rate": 2e-3,
                "matrix_learning_rate": 4e-3, "warmup": 30, "checkpoint_every": steps, "log_every": 50, "workers": 0,
            },
        }  # fmt: skip
        train(check_recipe(values))
    return Session.load(folder / "model")


def _records(session: Session, part: str, task: str, asked: int) -> list[Mapping[str, Any]]:
    source = open_source(f"market:{part}/test")
    view = SlotView.of(session.task(task), source)
    return [{**view(source[i]), "attributes": source[i]["attributes"]} for i in range(asked)]


def _measured(session: Session, part: str, task: str, slot: str, asked: int) -> dict[str, float]:
    records = _records(session, part, task, asked)
    said = list(session.run_many(task, records))
    wanted = [r[slot] if isinstance(r[slot], list) else [r[slot]] for r in records]
    # Of the table, what the true text tells: a host does not speak of everything.
    tables = [
        [str(v) for row in r["attributes"] for v in row.values() if all(str(v) in text for text in texts)]
        for r, texts in zip(records, wanted, strict=True)
    ]
    return {
        "bleu": bleu(said, wanted).corpus(np.arange(asked)),
        "parent": float(parent(said, wanted, tables).examples.mean()),
        "facts": float(facts_kept(said, wanted, tables).examples.mean()),
    }


def _timed(sessions: Mapping[str, Session], part: str) -> dict[str, float]:
    asked = {task: _records(session, part, task, 10) for task, session in sessions.items()}
    sides = {
        task: (lambda task=task, session=session: [list(session.run_many(task, [r])) for r in asked[task]])
        for task, session in sessions.items()
    }
    return {task: 1000 * timing.median / 10 for task, timing in race(sides, repeats=5, warmup=1).items()}

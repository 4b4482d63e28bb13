"""M6 in industry: a pretrained model with a twentieth of the labels against the same network from nothing with all.

The pretrained one is what `openm6 train market` leaves: the demo's model after texts of the market without labels.
"""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine
from openm6.core.errors import UsageError
from openm6.evaluate.command import measure
from openm6.inference.session import Session
from openm6.train.finetune import finetune_recipe
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from reproduce.common import ROOT, SCALES, Scale, verdict

TITLE = "A twentieth of the labels"
MODEL = ROOT / "runs" / "market" / "model"
BEFORE = ROOT / "runs" / "demo" / "model"
LABELS = {"tiny": 40, "small": 8000, "large": 8000}
STEPS = {"tiny": 4, "small": 200, "large": 3000}
SEEDS = {"tiny": 1, "small": 3, "large": 3}
ASKED = {"tiny": 8, "small": 300, "large": 500}
VALIDATED = 100

TASKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "text_classification": ("market:reviews", "accuracy", {}),
    "title": ("market:passages", "rouge_l", {"text": "passage"}),
    "product_copy": ("market:copy", "bleu", {}),
}
"""Task: its data, its metric, columns."""

WAYS: dict[str, tuple[str, float]] = {
    "pretrained, 5%": ("texts", 0.05), "from nothing, 100%": ("nothing", 1.0), "from nothing, 5%": ("nothing", 0.05),
    "without the texts, 5%": ("demo", 0.05),
}  # fmt: skip
"""What it begins with (`texts`: the demo's model after unlabelled texts), and the share of the labels."""

INTRO = (
    "M6 was fine-tuned for copy of its platform on 5% of the data and did better than models without pretraining. Here "
    "the demo's model, after 1,200 steps on texts without labels (`openm6 train market`), learns each task from 5% of "
    "the labels; the same network from random weights learns it from all of them, and from 5%; and so does the demo's "
    "model without those texts. The same number of steps for all, early stopping by the same validation records, all "
    "weights."
)


def run(scale: Scale, folder: Path, out: Path, model: Path = MODEL, before: Path = BEFORE) -> Path:
    """Fine-tune in every way, several seeds, and write the page; what is done already is not done again."""
    name = next(name for name, one in SCALES.items() if one is scale)
    if not (model.is_dir() and before.is_dir()):
        raise UsageError(f"{model} is not there: run `make demo`, then `openm6 train market`.")
    rows: list[dict[str, Any]] = []
    bases = {"texts": model, "demo": before, "nothing": None}
    for task in TASKS:
        for way in WAYS:
            found = [_figure(task, way, seed, name, bases, folder) for seed in range(SEEDS[name])]
            rows.append({"task": task, "way": way, "metric": TASKS[task][1], "figures": found})
            print(f"{task}, {way}: {TASKS[task][1]} {median(found):.3f}", flush=True)
    return _page(rows, name, out)


def _figure(task: str, way: str, seed: int, name: str, bases: dict[str, Path | None], folder: Path) -> float:
    kept = folder / f"{task}-{way.replace(', ', '-').replace(' ', '-')}-{seed}.json"
    if kept.is_file():
        return float(json.loads(kept.read_text("utf-8")))
    data, metric, columns = TASKS[task]
    start, share = WAYS[way]
    given = bases[start] or bases["texts"]
    assert given is not None
    labels = max(1, round(LABELS[name] * share))
    values = finetune_recipe(
        given, task, [f"{data}/train?records={labels}&seed={seed}"], output=folder / "run", steps=STEPS[name],
        validation=f"{data}/validation?records={VALIDATED}&seed={seed}", columns=columns, seed=seed,
        noise=0.0 if share == 1 else 0.05, label_smoothing=0.0 if share == 1 else 0.1,
    )  # fmt: skip
    values["train"]["workers"] = 0
    if bases[start] is None:  # the same tokens for all
        values["model"] = {"preset": "demo", "max_length": values["train"]["row_length"]}
        values["tokenizer"] = {"path": str(given)}
    shutil.rmtree(folder / "run", ignore_errors=True)
    session = Session.load(train(check_recipe(values)))
    figure = measure(session, task, f"{data}/test", columns, limit=ASKED[name], answers=True).scores[metric].value
    kept.write_text(json.dumps(figure), "utf-8")
    shutil.rmtree(folder / "run")
    return figure


def _page(rows: list[dict[str, Any]], name: str, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    by = {(row["task"], row["way"]): row["figures"] for row in rows}
    few, *others = WAYS
    lines = [f"# {TITLE}", "", INTRO, "", "## What holds here", "", "| claim | here | figures |", "| --- | --- | --- |"]
    for task, (_, metric, _) in TASKS.items():
        for other in others:
            a, b = by[task, few], by[task, other]
            lines.append(
                f"| {task}: {few}, beats {other} | {verdict(a, b)} | {metric} {median(a):.3f} against {median(b):.3f} |"
            )
    lines += ["", "## Figures", "", "| task | metric | " + " | ".join(WAYS) + " |", "| --- " * (2 + len(WAYS)) + "|"]
    for task, (_, metric, _) in TASKS.items():
        cells = (
            f"{median(f):.3f} ({min(f):.3f} to {max(f):.3f})" if len(f) > 1 else f"{f[0]:.3f}"
            for f in (by[task, way] for way in WAYS)
        )
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{LABELS[name]:,} labels are all of them; {STEPS[name]} steps of 32 at most, {ASKED[name]} held-out records, "
        f"{SEEDS[name]} seeds: median, lowest and highest. With 5% the network's input is noised a little and the "
        "targets smoothed, pretrained or not. The unlabelled texts are those of the training split. In so many steps "
        f"a network sees {min(LABELS[name], 32 * STEPS[name]):,} of all labels: given more steps, one from nothing "
        "would learn more of them.",
        "",
        f"Made by `openm6 reproduce five-percent` on {machine()}, {date.today().isoformat()}.",
        "",
    ]
    page = out / "five_percent.md"
    page.write_text("\n".join(lines), "utf-8")
    (out / "five_percent.json").write_text(json.dumps(rows, ensure_ascii=False) + "\n", "utf-8")
    return page

"""The loop of pictures and people's verdicts, with simulated reviewers, who go by a rule that the model is not told.

    make demo-images
    .venv/bin/python examples/review_loop.py runs/demo-images/model runs/demo-images/judge/model runs/review

A round: candidates for 150 prompts, the verdicts on the best four of each, 200 steps in which the model learns to
foresee them. Then 150 other prompts: drawn by the model that it was at first, and by the one that has learned, ranked
without its estimate of quality and with it.

Not run by the tests: it takes the model of `make demo-images` and its judge.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import openm6
from openm6.data.source import open_source
from openm6.evaluate.pictures import Judge, judged
from openm6.studio.images import make_batch, write_labelled
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

DATA, TASK = "demo:studio/train", "text_to_image"
MISTAKES = 0.05
"""Share of the verdicts that come out as the opposite."""


def likes(file: Path) -> bool:
    """The rule: the item fills more than a fifth of the picture, and its ground is bright."""
    pixels = np.asarray(Image.open(file).convert("RGB"), np.float32)
    border = np.concatenate((pixels[:3], pixels[-3:], pixels[:, :3].swapaxes(0, 1), pixels[:, -3:].swapaxes(0, 1)), 1)
    ground = np.median(border.reshape(-1, 3), 0)
    item = np.abs(pixels - ground).max(2) > 45
    return bool(item.mean() > 1 / 5 and ground.mean() > 170)


def write_prompts(folder: Path, number: int, count: int) -> list[dict[str, Any]]:
    """The `number`-th `count` captions of the data as prompts; returns their records."""
    source = open_source(DATA)
    records = [source[i] for i in range(number * count, (number + 1) * count)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"caption": record["caption"][0]}, ensure_ascii=False) + "\n" for record in records]
    (folder / f"prompts-{number}.jsonl").write_text("".join(lines), "utf-8")
    return records


def review(batch: Path, seed: int) -> dict[str, Any]:
    """What the page's labels.jsonl would have, and what `openm6 images labels` makes of it."""
    chance, lines = np.random.default_rng(seed), []
    for row in map(json.loads, (batch / "candidates.jsonl").read_text("utf-8").splitlines()):
        accepted = likes(batch / row["file"]) != (chance.random() < MISTAKES)
        lines.append(json.dumps({"file": row["file"], "accepted": accepted}) + "\n")
    (batch / "labels.jsonl").write_text("".join(lines), "utf-8")
    return write_labelled(batch, batch / "labels.jsonl")


def learn(model: Path, labelled: list[str], output: Path) -> Path:
    """The model that has learned from all verdicts so far, and goes on drawing beside."""
    verdicts = [{"source": file, "task": TASK, "name": "verdicts", "weight": 1 / len(labelled)} for file in labelled]
    replay = {"source": DATA, "task": TASK, "name": "drawing", "weight": 2}  # drawing is not forgotten
    recipe = {
        "name": "quality", "output": str(output), "model": {"path": str(model)}, "data": [*verdicts, replay],
        "train": {
            "steps": 200, "batch_size": 64, "optimizer": "muon", "learning_rate": 5e-4, "matrix_learning_rate": 1e-3,
            "warmup": 20, "checkpoint_every": 200, "log_every": 20, "workers": 0,
        },
    }  # fmt: skip
    return train(check_recipe(recipe))


def right(judge: Judge, batch: Path, records: list[dict[str, Any]]) -> float:
    """Share of the first pictures in which the judge reads all that was asked for."""
    rows = [json.loads(line) for line in (batch / "candidates.jsonl").read_text("utf-8").splitlines()]
    best = [row for row in rows if row["rank"] == 1]
    wanted = [{name: records[row["prompt"]][name] for name in judge.task.outputs} for row in best]
    return float(np.mean([r["all"] for r in judged(judge, [batch / row["file"] for row in best], wanted)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "judge", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=150)
    asked = parser.parse_args()
    model, judge, labelled = asked.model, Judge(openm6.load(str(asked.judge))), []
    print(f"{'round':5}  {'ranked':15}  {'first accepted':>14}  {'all accepted':>12}  {'judge agrees':>12}")
    for number in range(asked.rounds + 1):
        records = write_prompts(asked.output, number, asked.prompts)
        prompts = asked.output / f"prompts-{number}.jsonl"
        ways = [("at first", asked.model, 0), ("without quality", model, 0), ("with quality", model, 1)]
        for name, drawing, weight in ways if number else ways[:1]:  # before any verdict there is no estimate of quality
            batch = asked.output / f"round-{number} {name}"
            make_batch(openm6.load(str(drawing)), TASK, prompts, batch, decoding={"quality": weight})
            found, agreed = review(batch, number), right(judge, batch, records)
            first = found["by_rank"][1]["accepted"]
            print(f"{number:5}  {name:15}  {first:14.1%}  {found['accepted']:12.1%}  {agreed:12.1%}", flush=True)
        if number < asked.rounds:
            labelled.append(found["file"])
            model = learn(model, labelled, asked.output / f"model-{number + 1}")


if __name__ == "__main__":
    main()

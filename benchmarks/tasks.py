"""Every task: learned for a few steps from the demo's model, for as many from nothing, and a trivial answer beside.

The demo's model has read little: it goes through `openm6 train market` first, 1,200 steps on texts without labels.
Tasks that draw start from what `make demo-images` leaves. The steps are the same, the data generated, what is measured
held out (docs/data.md). It goes on where it was interrupted: each figure is kept in runs/bench-tasks, with the log of
its training. Two are worked at together, a core each, which on two cores is a third faster than one after the other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, require_model
from openm6.core.sequence import IGNORE
from openm6.data.columns import SlotView
from openm6.data.source import open_source
from openm6.evaluate.command import measure, measure_retrieval
from openm6.evaluate.measure import references
from openm6.inference.session import Session
from openm6.tasks.encode import encode_example
from openm6.tasks.library import get
from openm6.tasks.metrics import score
from openm6.train.recipe import check_recipe
from openm6.train.trainer import train
from openm6.worlds.shop import AMONG

TITLE = "Every task, from the demo's model after unlabelled texts, and from nothing"
STEPS, BATCH, ASKED, LANES = 240, 24, 200, 2
LOWER = ("perplexity",)
"""Metrics that are better when lower."""


@dataclass(frozen=True)
class Side:
    """A task, its data without the split, its metric, and what a trivial answer is: `majority` (the most frequent
    answer in training), `random` (any answer of training), `copy` (what is given), `ngram` (bigrams of the answers'
    tokens), `mean` (the mean box), `chance` (any vector)."""

    task: str
    data: str
    metric: str
    trivial: str
    columns: dict[str, str] = field(default_factory=dict)
    against: str = ""
    against_columns: dict[str, str] = field(default_factory=dict)
    among_negatives: bool = False


SIDES = (
    Side("text_continuation", "market:facts", "perplexity", "ngram"),
    Side("infilling", "market:facts", "perplexity", "ngram"),
    Side("summary", "market:passages", "rouge_l", "copy"),
    Side("title", "market:passages", "rouge_l", "copy", {"text": "passage"}),
    Side("poem", "market:poems", "perplexity", "ngram"),
    Side("story", "market:stories", "rouge_l", "random"),
    Side("reading", "market:passages", "accuracy", "majority"),
    Side("question_answering", "market:knowledge", "accuracy", "majority"),
    Side("table_question", "market:tables", "accuracy", "majority"),
    Side("reply", "market:talks", "bleu", "random"),
    Side("product_copy", "market:copy", "bleu", "random"),
    Side("slogan_pair", "market:copy", "rouge_l", "random"),
    Side("slogan", "demo:catalogue", "rouge_l", "random"),
    Side("product_title", "demo:catalogue", "rouge_l", "random"),
    Side("table_to_text", "market:facts", "bleu", "copy"),
    Side("live_script", "market:live", "bleu", "copy"),
    Side("text_classification", "market:reviews", "accuracy", "majority"),
    Side("entailment", "market:entailment", "accuracy", "majority"),
    Side("text_similarity", "market:similar", "spearman", "majority"),
    Side("caption", "demo:items", "bleu", "random"),
    Side("vqa", "demo:questions", "accuracy", "majority"),
    Side("image_classification", "digits", "accuracy", "majority"),
    Side("product_attributes", "demo:items", "accuracy", "majority"),
    Side("visual_entailment", "scenes", "accuracy", "majority"),
    Side("image_text_matching", "demo:matches", "accuracy", "majority"),
    Side("grounding", "scenes", "iou", "mean"),
    Side("ocr", "writing", "character_accuracy", "random"),
    Side("text_vector", "scenes", "recall@10", "chance", {"text": "description"}, "image_vector"),
    Side("item_vector", "demo:catalogue", "recall@1", "chance", {}, "text_vector", {"text": "caption"}),
    Side(
        "style_vector",
        "shop:pairs",
        "recall@10",
        "chance",
        {},
        "style_vector",
        {"photo": "other_photo", "title": "other_title", "attributes": "other_attributes"},
    ),
    Side("reference", "shop:references", "recall@1", "chance", {}, "image_vector", among_negatives=True),
    Side("text_to_image", "demo:studio", "perplexity", "ngram"),
    Side("controlled_image", "demo:studio", "perplexity", "ngram"),
    Side("image_editing", "edits", "perplexity", "ngram"),
    Side("try_on", "tryon", "perplexity", "ngram"),
)


def run(
    sides: tuple[Side, ...] = SIDES, steps: int = STEPS, asked: int = ASKED, root: Path = ROOT
) -> tuple[list[dict[str, Any]], str]:
    for side in sides:
        require_model(_base(root, side), "`make bench-tasks` makes all that is needed")
    os.environ["OMP_NUM_THREADS"] = "1"
    rows, seconds = [], 0.0
    with ProcessPoolExecutor(LANES, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = [{name: pool.submit(_kept, root, side, name, steps, asked) for name in ACTS} for side in sides]
        for side, futures in zip(sides, waiting, strict=True):
            found = {name: future.result() for name, future in futures.items()}
            seconds += sum(one["seconds"] for one in found.values()) / LANES
            value = {name: one["value"] for name, one in found.items()}
            sign = -1 if side.metric in LOWER else 1
            best = sign * value["pretrained"]
            rows.append(
                {
                    "task": side.task, "data": side.data, "metric": side.metric,
                    "pretrained": round(value["pretrained"], 3), "from nothing": round(value["scratch"], 3),
                    "trivial": round(value["trivial"], 3),
                    "trivial answer": side.trivial, "beats nothing": best > sign * value["scratch"],
                    "beats trivial": best > sign * value["trivial"],
                }
            )  # fmt: skip
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    note = (
        f"{steps} steps of {BATCH} examples each, all weights, the same recipe and tokenizer on both sides (first: the "
        f"demo's model after `openm6 train market`; where pictures are drawn, after `make demo-images`); measured "
        f"on {asked} held-out records. Better than from nothing: {sum(r['beats nothing'] for r in rows)} of "
        f"{len(rows)}; than the trivial answer: {sum(r['beats trivial'] for r in rows)}. One seed. "
        f"{seconds / 60:.0f} minutes in all, {LANES} trainings at a time."
    )
    return rows, note


def _base(root: Path, side: Side) -> Path:
    return root / ("demo-images" if get(side.task).draws else "market") / "model"


def _kept(root: Path, side: Side, name: str, steps: int, asked: int) -> dict[str, float]:
    """The figure of an earlier run and the seconds that it took, or that of now, kept; in a process of its own."""
    folder = root / "bench-tasks"
    file, run = folder / f"{side.task}-{name}.json", folder / f"{side.task}-{name}"
    if file.is_file():
        found: dict[str, float] = json.loads(file.read_text("utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"{side.task}-{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started = time.perf_counter()
    value = ACTS[name](side, _base(root, side), run, steps, asked)
    found = {"value": value, "seconds": time.perf_counter() - started}
    file.write_text(json.dumps(found), "utf-8")
    return found


def _learned(side: Side, base: Path, folder: Path, steps: int, count: int, pretrained: bool) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    section: dict[str, Any] = {"source": f"{side.data}/train", "task": side.task, "columns": side.columns}
    if side.against:
        section |= {"against": side.against, "against_columns": side.against_columns}
    model: dict[str, Any] = {"path": str(base)}
    if not pretrained:
        model = {"preset": "demo", "max_length": 256}
        if get(side.task).draws:
            model["codec"] = str(base / "codec")
    values = {
        "name": f"{side.task} {'on' if pretrained else 'anew'}", "output": str(folder), "model": model,
        "tokenizer": {"path": str(base)}, "data": [section],
        "train": {
            "steps": steps, "batch_size": BATCH, "row_length": 256, "optimizer": "muon", "learning_rate": 1e-3,
            "matrix_learning_rate": 2e-3, "warmup": 10, "checkpoint_every": steps, "log_every": 20, "workers": 0,
        },
    }  # fmt: skip
    session = Session.load(train(check_recipe(values)))
    test = f"{side.data}/test"
    if side.against:
        found = measure_retrieval(
            session, side.task, side.against, test, side.columns, side.against_columns, limit=count,
            among_negatives=side.among_negatives,
        )  # fmt: skip
    else:
        found = measure(session, side.task, test, side.columns, limit=count, answers=False)
    shutil.rmtree(folder)
    return found.values()[side.metric]


def _trivial(side: Side, base: Path, folder: Path, steps: int, count: int) -> float:
    if side.trivial == "chance":
        return int(side.metric.partition("@")[2]) / (AMONG if side.among_negatives else count)
    task = get(side.task)
    splits = [open_source(f"{side.data}/{split}") for split in ("train", "test")]
    views = [SlotView.of(task, records, side.columns) for records in splits]
    known = [views[0](splits[0][i]) for i in range(min(2000, len(splits[0])))]
    asked = [views[1](splits[1][i]) for i in range(min(count, len(splits[1])))]
    if side.trivial == "ngram":
        return _bigrams(side, base, known, asked)
    output = task.outputs[0]
    kind = task.slots[output].type
    wanted = [references(record[output], kind) for record in asked]
    if side.trivial == "mean":
        answers = [str(np.mean([record[output] for record in known], 0).tolist())] * len(asked)
    elif side.trivial == "majority":
        counts = Counter(references(record[output], kind)[0] for record in known)
        answers = [counts.most_common(1)[0][0]] * len(asked)
    elif side.trivial == "random":
        rng = np.random.default_rng(0)
        answers = [references(known[int(rng.integers(len(known)))][output], kind)[0] for _ in asked]
    else:
        answers = [_copied(record[task.inputs[0]], side.metric) for record in asked]
    return score(side.metric, answers, wanted).value


def _copied(value: Any, metric: str) -> str:
    """The baseline answer from the inputs: a table's values in a row, a text itself, for a summary or title its first
    sentence."""
    if isinstance(value, list):
        return "，".join(str(cell) for row in value for cell in row.values()) + "。"
    return str(value).split("。")[0] + "。" if metric == "rouge_l" else str(value)


def _bigrams(side: Side, base: Path, known: list[Any], asked: list[Any]) -> float:
    """Perplexity of the answers' tokens by bigrams of 2,000 training records, with unigrams and an even share mixed in
    (0.7, 0.25, 0.05)."""
    processor = Session.load(base, "meta", trainable=True).processor
    task = get(side.task)

    def tokens(record: Any) -> list[int]:
        found = encode_example(task, record, processor, rng=None)
        return [0, *found.labels[found.labels != IGNORE].tolist()]

    pairs: Counter[tuple[int, int]] = Counter()
    firsts: Counter[int] = Counter()
    singles: Counter[int] = Counter()
    for record in known:
        ids = tokens(record)
        pairs.update(pairwise(ids))
        firsts.update(ids[:-1])
        singles.update(ids[1:])
    total, size = sum(singles.values()), processor.tokenizer.vocab_size
    losses = [
        -np.log(0.7 * pairs[a, b] / max(1, firsts[a]) + 0.25 * singles[b] / total + 0.05 / size)
        for record in asked
        for a, b in pairwise(tokens(record))
    ]
    return float(np.exp(np.mean(losses)))


ACTS: dict[str, Callable[[Side, Path, Path, int, int], float]] = {
    "trivial": _trivial,
    "scratch": partial(_learned, pretrained=False),
    "pretrained": partial(_learned, pretrained=True),
}

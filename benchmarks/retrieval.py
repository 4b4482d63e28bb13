"""Results of `openm6 train vectors`: images found by texts, the thing a sentence means, goods that go together, and
a recommender; the last two against pictures alone, texts alone, and what is most bought.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, require_model
from openm6.data.source import Source, open_source
from openm6.evaluate.command import evaluate_retrieval, measure_retrieval
from openm6.inference.session import Session
from openm6.retrieve.fill import create_for
from openm6.retrieve.recommend import Recommender
from openm6.tasks.metrics import Score, Values, score_of
from openm6.train.recipe import load_recipe
from openm6.train.trainer import train

TITLE = "Vectors: texts, pictures, goods that go together, recommendations"
AMONG, NEAR = 1000, 10

SIDES = {
    "picture, title, table": ("style_vector", ("photo", "title", "attributes")),
    "picture alone": ("image_vector", ("photo",)),
    "title, table": ("style_vector", ("title", "attributes")),
}
"""The inputs of an item's vector: its task, and the columns that the task reads."""


def run() -> tuple[list[dict[str, Any]], str]:
    base = ROOT / "demo" / "model"
    require_model(base, "run `make demo` first")
    both = _trained("vectors")
    rows = [
        *_rows("text to picture, among 1,000 others", "", _texts(both)),
        *_rows("what a sentence means, among 8", "", measure_retrieval(
            both, "reference", "image_vector", "shop:references/test", among_negatives=True
        ).scores),
    ]  # fmt: skip
    for number, (name, (task, seen)) in enumerate(SIDES.items()):
        session = _trained("vectors-images", pictures_alone=True) if task == "image_vector" else both
        rows += _rows("goods of one look among the nearest 10", name, {"precision@10": _looks(session, task, seen)})
        found = _recommended(session, task, seen, ROOT / f"bench-retrieval-{number}")
        rows += _rows("next purchase, among 4,000", f"{name}: recalled", found["recalled"])
        rows += _rows("next purchase, among 4,000", f"{name}: ranked", found["ranked"])
        rows += _rows("next purchase, among 4,000", f"{name}: nearest", found["near"])
        if number == 0:
            rows += _rows("next purchase, among 4,000", "most bought", found["popular"])
    note = (
        "One seed; 95% intervals over records. Pictures, goods, customers and combinations that no training record has "
        "(goods of the recommender excepted: customers alone are new). Pictures alone: a model of its own, trained "
        "with the same steps on pictures; titles and tables: the first model without pictures."
    )
    return rows, note


def _trained(name: str, pictures_alone: bool = False) -> Session:
    folder = ROOT / name
    if not (folder / "model").is_dir():
        recipe = load_recipe("vectors", [f"output={folder}", f"model.path={ROOT / 'demo' / 'model'}"])
        if pictures_alone:
            style = next(section for section in recipe.data if section.name == "style")
            style.task = style.against = "image_vector"
            style.against_columns = {"photo": "other_photo"}
        train(recipe)
    return Session.load(folder / "model")


def _rows(what: str, name: str, scores: Mapping[str, Score]) -> list[dict[str, Any]]:
    wanted = ("recall@1", "recall@10", "recall@300", "ndcg@10", "auc", "precision@10")
    rows = [
        {"task": what, "by": name, "metric": metric, "value": round(s.value, 4), "low": round(s.low, 4),
         "high": round(s.high, 4), "n": s.n}
        for metric, s in scores.items() if metric in wanted
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def _texts(session: Session) -> Mapping[str, Score]:
    """Scenes of which no two hold the same goods."""
    distinct: dict[str, Mapping[str, Any]] = {}
    for record in open_source(f"scenes/test?pictures={2 * AMONG}"):
        names = record["description"].removeprefix("图中有").removesuffix("。").split("、")
        distinct.setdefault("、".join(sorted(names)), record)
    some = list(distinct.values())[:AMONG]
    assert len(some) == AMONG
    queries, keys = [{"text": r["description"]} for r in some], [{"photo": r["image"]} for r in some]
    return evaluate_retrieval(session, session.task("text_vector"), session.task("image_vector"), queries, keys).scores


def _seen(source: Source, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{name: record[name] for name in columns} for record in source]


def _looks(session: Session, task: str, columns: tuple[str, ...]) -> Score:
    """The share, among the ten nearest of each of the items never seen, of those of its look."""
    source = open_source("shop:items/test")
    vectors = np.stack(list(session.vectors(task, _seen(source, columns))))
    looks = np.array([record["look"] for record in source])
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :NEAR]
    return score_of(Values.mean((looks[nearest] == looks[:, None]).mean(1).tolist()))


def _recommended(session: Session, task: str, columns: tuple[str, ...], folder: Path) -> dict[str, dict[str, Score]]:
    shutil.rmtree(folder, ignore_errors=True)
    keep = ("category", "season", "price")
    index = create_for(folder, session, task, "shop:items/train", id_column="id", keep=keep)
    source = open_source("shop:items/train")
    vectors = np.stack(list(session.vectors(task, _seen(source, columns), dims=index.dims)))
    index.add([r["id"] for r in source], vectors, {name: [r[name] for r in source] for name in keep})
    made = Recommender.fit(index, open_source("shop:visits/train"), ["season", "festival"])
    found = made.measure(open_source("shop:visits/test"))["all"]
    shutil.rmtree(folder)
    return found

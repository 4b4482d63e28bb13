"""Vectors: the loss against a naive loop, what is learned, and what comes out."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner

from openm6.cli import commands
from openm6.core.batch import pack, pad
from openm6.core.errors import DataError, UsageError
from openm6.evaluate.command import measure_retrieval
from openm6.inference.session import Session
from openm6.retrieve.ranks import rank_scores
from openm6.tasks.task import Task
from openm6.train.contrastive import contrast
from openm6.train.distributed import Group
from openm6.train.recipe import Recipe
from openm6.train.trainer import train
from tests.conftest import example
from tests.tasks.conftest import picture
from tests.train.conftest import logged, losses, tiny_recipe

ALONE = Group(0, 1, torch.device("cpu"))
WORDS = "红黄蓝绿紫粉黑橙"


def naive(
    queries: list[list[float]], keys: list[list[float]], groups: list[str], temperature: float, dims: list[int]
) -> list[float]:
    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))

    def one(mine: list[float], others: list[list[float]], place: int, skip: list[int]) -> float:
        near = [math.exp(cosine(mine, o) / temperature) if i not in skip else 0.0 for i, o in enumerate(others)]
        return -math.log(near[place] / sum(near))

    count, found = len(queries), []
    for i in range(count):
        skip = [j for j in range(count) if j != i and groups[j] == groups[i] != ""]
        both = [
            one(queries[i][:d], [k[:d] for k in keys], i, skip) + one(keys[i][:d], [q[:d] for q in queries], i, skip)
            for d in dims
        ]
        found.append(sum(both) / 2 / len(dims))
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 4), st.data())
def test_the_loss_is_that_of_a_naive_loop(pairs: int, negatives: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    queries, keys = rng.normal(size=(pairs, 6)), rng.normal(size=(pairs + negatives, 6))
    groups = [data.draw(st.sampled_from(["", "", "a", "b"])) for _ in range(pairs)]
    dims = data.draw(st.sampled_from([[6], [2, 6], [3]]))
    found = contrast(torch.tensor(queries), torch.tensor(keys), groups, 0.2, dims, ALONE)
    assert found.tolist() == pytest.approx(
        naive(queries.tolist(), keys.tolist(), groups, 0.2, dims), rel=1e-4, abs=1e-6
    )


def test_the_last_position_of_every_example_is_found_wherever_it_was_packed() -> None:
    rng = np.random.default_rng(0)
    examples = [example(rng, 2 + i % 4, 1 + i % 5) for i in range(9)]
    for number, one in enumerate(examples):
        one.ids[-1] = 900 + number
    for batch in (pack(examples, 24, 0), pack(examples, 24, 0, balance_rows=True), pad(examples, 0)):
        assert batch.ids.flatten()[batch.ends()].tolist() == list(range(900, 909))


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of texts that say the same in different words, each with a hard negative."""
    lines = []
    for number, word in enumerate(WORDS):
        wrong = WORDS[(number + 1) % len(WORDS)]
        lines.append({"first": f"要{word}的", "second": f"{word}色一件", "negatives": [{"second": f"{wrong}色两件"}]})
    file = tmp_path_factory.mktemp("things") / "things.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    return file


def matching(file: Path, output: Path, **changes: object) -> Recipe:
    data = [
        {
            "source": str(file), "task": "text_vector", "against": "text_vector", "columns": {"text": "first"},
            "against_columns": {"text": "second"}, "name": "pairs",
        }
    ]  # fmt: skip
    return tiny_recipe(output, data=data, learning_rate=2e-2, vectors={"dims": [8, 32]}, **changes)


@pytest.fixture(scope="module")
def model(things: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(matching(things, tmp_path_factory.mktemp("run"), steps=60, checkpoint_every=60))


def measured(model: Path, things: Path, **options: object) -> dict[str, float]:
    columns = {"columns": {"text": "first"}, "against_columns": {"text": "second"}}
    return measure_retrieval(
        Session.load(model), "text_vector", "text_vector", str(things), **columns, **options
    ).values()


@pytest.mark.slow
def test_what_belongs_together_finds_itself_also_with_few_numbers(model: Path, things: Path) -> None:
    told = losses(model.parent)
    assert told[max(told)] < 0.3 * told[min(told)]
    assert measured(model, things)["recall@1"] == 1
    assert measured(model, things, dims=8)["recall@1"] >= 0.75


def test_a_pair_that_is_cut_counts_as_one_example(things: Path, tmp_path: Path) -> None:
    recipe = matching(things, tmp_path / "run", steps=1)
    recipe.model.max_length = 3
    train(recipe)
    last = logged(tmp_path / "run")[-1]
    assert last["cut"] == last["examples"] == 8


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(model: Path) -> None:
    session = Session.load(model, "cpu", trainable=True)
    records = [{"text": "红" * n} for n in (1, 9, 3)]
    together = np.stack(list(session.vectors("text_vector", records)))
    assert together.shape == (3, 32) and np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    alone = np.stack([session.run("text_vector", **record) for record in records])
    np.testing.assert_allclose(together, alone, atol=2e-2)  # bf16, on some machines
    short = np.stack(list(session.run_many("text_vector", records, decoding={"dims": 4})))
    expected = together[:, :4] / np.linalg.norm(together[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-5)


def test_pictures_and_texts_share_a_room(tmp_path: Path) -> None:
    data = [
        {"source": "demo:items/train?pictures=20", "task": "text_vector", "against": "image_vector",
         "same": ["category", "colour", "pattern"]},
        {"source": "demo:questions/train?pictures=20", "task": "vqa"},
    ]  # fmt: skip
    evaluation = {"every": 3, "data": [{**data[0], "source": "demo:items/test?pictures=12"}]}
    trained = train(tiny_recipe(tmp_path, data=data, evaluation=evaluation))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert {"recall@1", "mrr", "ndcg@10"} <= {key for line in lines for key in line}
    session = Session.load(trained)
    assert session.run("image_vector", photo=picture()).shape == (32,) and session.run(
        "vqa", photo=picture(), question="?"
    )


@pytest.mark.slow
def test_two_runs_are_one(things: Path, tmp_path: Path) -> None:
    first, second = (train(matching(things, tmp_path / name)) for name in "ab")
    assert losses(first.parent) == losses(second.parent)


def test_the_commands_give_and_measure_vectors(model: Path, things: Path) -> None:
    def call(*words: str) -> dict:
        done = CliRunner().invoke(commands(), [*words, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    assert len(call("run", str(model), "text_vector", "text=红", "-o", "dims=5")["answer"]) == 5
    words = ("eval", str(model), "--task", "text_vector", "--data", str(things), "-c", "text=first")
    assert call(*words, "--against-column", "text=second")["scores"]["recall@1"]["value"] == 1


def test_it_is_found_among_its_own_negatives_alone(model: Path, tmp_path: Path) -> None:
    session = Session.load(model)
    words = ["红", "蓝", "大", "小", "圆"]
    vectors = dict(zip(words, session.vectors("text_vector", [{"text": w} for w in words]), strict=True))
    records = [{"first": "红", "second": "蓝", "negatives": [{"second": w} for w in some]} for some in ("大", "小圆")]
    expected = [
        1 / (1 + sum(vectors["红"] @ vectors[other["second"]] >= vectors["红"] @ vectors["蓝"] for other in negatives))
        for negatives in (record["negatives"] for record in records)
    ]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8")
    columns = {"text": "first"}, {"text": "second"}
    ask = partial(measure_retrieval, session, "text_vector", "text_vector", str(file), *columns, among_negatives=True)
    assert ask().scores["mrr"].value == pytest.approx(np.mean(expected))
    file.write_text(json.dumps({**records[0], "negatives": []}, ensure_ascii=False), "utf-8")
    with pytest.raises(DataError, match="no negatives"):
        ask()


@pytest.mark.slow
@settings(deadline=None, max_examples=30)  # of each a confidence interval is drawn
@given(st.integers(1, 5), st.integers(1, 14), st.data())
def test_ranks_are_those_of_a_naive_loop(queries: int, keys: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    likeness, right = rng.integers(0, 4, (queries, keys)).astype(float), rng.random((queries, keys)) < 0.3
    right[np.arange(queries), rng.integers(keys, size=queries)] = True
    found = {name: score.value for name, score in rank_scores(likeness, right).items()}
    ranks, gains = [], []
    for row in range(queries):
        order = sorted(range(keys), key=lambda k: (-likeness[row, k], right[row, k]))
        hits = [bool(right[row, k]) for k in order]
        ranks.append(hits.index(True) + 1)
        best = sum(1 / math.log2(i + 2) for i in range(min(10, sum(hits))))
        gains.append(sum(1 / math.log2(i + 2) for i, hit in enumerate(hits[:10]) if hit) / best)
    assert found["mrr"] == pytest.approx(np.mean([1 / r for r in ranks]))
    assert found["ndcg@10"] == pytest.approx(np.mean(gains))
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(np.mean([r <= k for r in ranks]))


def test_what_cannot_be_is_told(model: Path, things: Path, tmp_path: Path) -> None:
    session = Session.load(model)
    with pytest.raises(UsageError, match="dims is 33"):
        list(session.vectors("text_vector", [{"text": "红"}], dims=33))
    with pytest.raises(UsageError, match="gives no vector"):
        list(session.vectors("caption", [{"photo": picture()}]))
    with pytest.raises(UsageError, match="stands alone"):
        Task.from_instruction("[text:a] -> [vector:v] [text:b]")
    with pytest.raises(UsageError, match="learned by two tasks"):
        train(
            tiny_recipe(
                tmp_path / "a", data=[{"source": str(things), "task": "text_vector", "columns": {"text": "first"}}]
            )
        )
    recipe = matching(things, tmp_path / "b")
    recipe.vectors.dims = [64]
    with pytest.raises(UsageError, match="dims has 64"):
        train(recipe)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"first": "红", "second": "红", "negatives": "蓝"}), "utf-8")
    with pytest.raises(DataError, match="negatives has to be a list"):
        train(matching(bad, tmp_path / "c"))
    with pytest.raises(UsageError, match="A vector does not come in pieces"):
        list(session.stream("text_vector", text="红"))

"""The reproductions: a corpus of a known entropy, honest verdicts, and a whole run at a tiny scale."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openm6.core.errors import UsageError
from openm6.train.trainer import train
from reproduce import five_percent, progressive
from reproduce.common import SCALES, Run, Variant, compare, train_all, verdict, write_page
from reproduce.corpus import ENTROPY, ODDS, write_corpus
from tests.conftest import drawing_session
from tests.train.conftest import tiny_recipe


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]


def test_the_corpus_is_what_it_says(tmp_path: Path) -> None:
    files = write_corpus(tmp_path / "a", languages=2, characters=6, lines=400, test_lines=50, length=40, seed=3)
    train, test = texts(files["train"]), texts(files["test"])
    assert (len(train), len(test)) == (400, 50)
    assert not set(train) & set(test)
    follows: dict[tuple[str, str], Counter[str]] = {}
    for text in train:
        for i in range(2, len(text)):
            follows.setdefault((text[0], text[i - 1]), Counter())[text[i]] += 1
    # In both splits a character is one of the at most four successors of the one before it in its language.
    assert all(len(counter) <= 4 for counter in follows.values())
    for text in test:
        for i in range(2, len(text)):
            seen = follows.get((text[0], text[i - 1]))
            assert seen is None or sum(seen.values()) < 60 or text[i] in seen
    # The most frequent successor of a character with four different ones has the odds 8 in 15.
    shares = [
        c.most_common(1)[0][1] / sum(c.values()) for c in follows.values() if len(c) == 4 and sum(c.values()) > 200
    ]
    assert np.mean(shares) == pytest.approx(ODDS[0], abs=0.03)
    assert pytest.approx(1.137, abs=1e-3) == ENTROPY
    again = write_corpus(tmp_path / "b", languages=2, characters=6, lines=400, test_lines=50, length=40, seed=3)
    assert texts(again["train"]) == train


def runs(losses: list[float]) -> list[Run]:
    return [Run([(1, loss)], loss, 0.1, 1e12, [1], [], 0.0) for loss in losses]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([1.0, 1.01, 0.99], [1.2, 1.21, 1.19], "holds"),
        ([1.0, 1.1, 0.9], [1.01, 1.11, 0.91], "holds in every seed, by less than the seeds differ"),
        ([1.0, 1.3, 0.9], [1.1, 1.2, 1.0], "not settled: the seeds disagree"),
        ([1.2, 1.21, 1.19], [1.0, 1.01, 0.99], "does not hold: the other way round in every seed"),
    ],
)
def test_a_verdict_needs_all_seeds(better: list[float], worse: list[float], verdict: str) -> None:
    assert compare("a claim", runs(better), runs(worse)).verdict == verdict


@pytest.mark.slow
def test_runs_are_measured_and_told(tmp_path: Path) -> None:
    scale = replace(SCALES["tiny"], seeds=1)
    sizes = {"num_experts": 4, "experts_per_token": 1}
    variants = [
        Variant("from scratch", sizes),
        Variant("shared", sizes, pseudo={"layers": 1, "steps": 3}),
        Variant("stacked", sizes, grown_from=(1, 3)),
    ]
    found = train_all("a claim", variants, scale, tmp_path / "work")
    findings = [compare("shared is better", found["shared"], found["from scratch"])]
    page = write_page("claim", "A claim", "What is compared.", scale, found, findings, tmp_path / "out")
    text = page.read_text("utf-8")
    assert findings[0].verdict in text
    told = json.loads(page.with_suffix(".json").read_text("utf-8"))
    for variant in variants:
        (run,) = told["runs"][variant.name]
        assert [step for step, _ in run["curve"]] == [1, 2, 3, 4, 5, 6]
        assert 2.0 < run["test_loss"] < 8.0
        assert run["memory"] == sorted(run["memory"])
        assert len(run["memory"]) == 6
    # Half of the stacked network's steps are half as deep; sharing saves none.
    scratch, shared, stacked = (told["runs"][v.name][0]["flops"] for v in variants)
    assert stacked < 0.95 * scratch
    assert shared == pytest.approx(scratch, rel=0.01)
    assert page.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        ([0.8, 0.82, 0.81], [0.6, 0.61, 0.62], "holds"),
        ([0.8, 0.7, 0.9], [0.79, 0.69, 0.89], "holds in every seed, by less than the seeds differ"),
        ([0.8, 0.7, 0.9], [0.7, 0.8, 0.8], "not settled: the seeds disagree"),
        ([0.6, 0.6, 0.6], [0.7, 0.8, 0.8], "does not hold: the other way round in every seed"),
    ],
)
def test_a_verdict_on_shares_needs_all_seeds_too(better: list[float], worse: list[float], said: str) -> None:
    assert verdict(better, worse) == said


@pytest.mark.slow
def test_ways_of_drawing_are_compared(tmp_path: Path) -> None:
    session = drawing_session()
    for place in ("model", "judge/model"):
        session.save(tmp_path / place)
    page = progressive.run(SCALES["tiny"], tmp_path / "work", tmp_path / "out", tmp_path)
    rows = json.loads((tmp_path / "out" / "progressive.json").read_text("utf-8"))
    assert [(r["way"], r["passes"]) for r in rows] == [
        ("one pass", 1), *((way, passes) for way in progressive.WAYS for passes in (1, 2))
    ]  # fmt: skip
    # Alike but for chance of the seeds: one pass is one pass.
    assert rows[0]["all"] == rows[1]["all"] and rows[0]["frechet"] == pytest.approx(rows[1]["frechet"], rel=1e-3)
    text = page.read_text("utf-8")
    assert "8 captions" in text and "progressive, both" in text and (tmp_path / "out" / "progressive.png").is_file()
    with pytest.raises(UsageError, match="run `make demo-images` first"):
        progressive.run(SCALES["tiny"], tmp_path / "work", tmp_path / "out", tmp_path / "nowhere")


@pytest.mark.slow
def test_few_labels_are_compared_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = {"TASKS": {"title": five_percent.TASKS["title"]}, "STEPS": {"tiny": 2}, "VALIDATED": 10}
    for name, value in fewer.items():
        monkeypatch.setattr(five_percent, name, value)
    data = [{"source": "market:copy/train?records=20", "task": "text_continuation", "columns": {"text": "copy"}}]
    model = train(tiny_recipe(tmp_path / "market", data=data, row_length=256, steps=2, checkpoint_every=2))
    page = five_percent.run(SCALES["tiny"], tmp_path / "work", tmp_path / "out", model, model)
    rows = json.loads((tmp_path / "out" / "five_percent.json").read_text("utf-8"))
    assert [(r["task"], r["way"]) for r in rows] == [(t, way) for t in five_percent.TASKS for way in five_percent.WAYS]
    assert all(len(row["figures"]) == 1 and 0 <= row["figures"][0] <= 100 for row in rows)
    assert "title: pretrained, 5%, beats from nothing, 100%" in page.read_text("utf-8")
    (tmp_path / "work").joinpath("title-from-nothing-5%-0.json").write_text("0.5", "utf-8")
    five_percent.run(
        SCALES["tiny"], tmp_path / "work", tmp_path / "out", model, model
    )  # what is there is not done again
    again = json.loads((tmp_path / "out" / "five_percent.json").read_text("utf-8"))
    assert next(r for r in again if r["task"] == "title" and r["way"] == "from nothing, 5%")["figures"] == [0.5]
    with pytest.raises(UsageError, match="openm6 train market"):
        five_percent.run(SCALES["tiny"], tmp_path / "work", tmp_path / "out", tmp_path / "nowhere")

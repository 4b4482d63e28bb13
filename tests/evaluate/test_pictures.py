"""Measures of drawn pictures: against their definitions, and a judge that can be told right from wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from openm6.core.batch import pad
from openm6.core.errors import DataError, UsageError
from openm6.core.images import ImageGrid
from openm6.core.sequence import IGNORE
from openm6.core.tokenizer import Tokenizer
from openm6.evaluate.pictures import Judge, Real, draw_sheet, frechet, judged, share_among
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.encode import encode_example
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["红色条纹鞋包"], 600)
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    task = Task.from_instruction("[image:photo] -> [label:colour|set=红,蓝] [label:kind|set=鞋,包]", "seen")
    grid = ImageGrid(config.image_stride, config.image_max_patches)
    return Judge(Session(M6(config).eval(), Processor(tokenizer, grid, 64), [task]), "seen", batch_size=4)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def test_what_the_judge_reads_is_compared_by_attribute(judge: Judge) -> None:
    some = pictures(6)
    seen = judge.read(some)
    other = {"红": "蓝", "蓝": "红"}
    wanted = [{**s, "colour": other[s["colour"]]} if i % 2 else s for i, s in enumerate(seen)]
    rows = judged(judge, some, wanted)
    assert [r["colour"] for r in rows] == [True, False] * 3
    assert all(r["kind"] for r in rows) and [r["all"] for r in rows] == [True, False] * 3


def test_relevance_is_the_probability_of_the_answer(judge: Judge) -> None:
    """Over all answers there can be, the probabilities are those of a forward pass, product over the tokens."""
    some = pictures(5)
    wanted = [{"colour": "红", "kind": "鞋" if i % 2 else "包"} for i in range(5)]
    found = judge.relevance(some, wanted)
    session = judge.session
    for picture, wish, value in zip(some, wanted, found.tolist(), strict=True):
        sequence = encode_example(judge.task, {"photo": picture, **wish}, session.processor)
        with torch.inference_mode():
            logits = session.model.logits(session.model(pad([sequence], 0)).hidden[0]).log_softmax(-1)
        labels = torch.from_numpy(sequence.labels.astype(np.int64))
        places = (labels != IGNORE).nonzero().squeeze(1)
        assert value == pytest.approx(float(logits[places, labels[places]].sum().exp()), rel=1e-3)


def test_frechet_is_the_distance_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 5, generator=generator) * s + m for s, m in ((1.0, 0.0), (1.5, 0.7)))
    x, y = a.double().numpy(), b.double().numpy()
    one, two = np.cov(x.T), np.cov(y.T)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-3)
    assert frechet(a, a) == pytest.approx(0, abs=1e-3)


def test_share_among_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    points, others = torch.randn(30, 3, generator=generator), torch.randn(40, 3, generator=generator) * 0.7
    radii = [sorted(float((o - p).norm()) for p in others)[3] for o in others]
    inside = [any(float((p - o).norm()) <= r for o, r in zip(others, radii, strict=True)) for p in points]
    assert 0 < sum(inside) < 30
    assert share_among(points, others) == pytest.approx(sum(inside) / 30)
    assert share_among(others, others) == 1.0
    with pytest.raises(DataError, match="3 pictures are too few: more than 3"):
        share_among(points, others[:3])


def test_real_pictures_measured_against_themselves_are_perfect(judge: Judge) -> None:
    some = pictures(12)
    found = Real(judge, some).measure(some, judge.read(some))
    assert found["all"] == found["colour"] == found["kind"] == found["precision"] == found["recall"] == 1.0
    assert found["frechet"] == pytest.approx(0, abs=1e-3) and found["diversity"] == pytest.approx(1)
    flat = Real(judge, some).measure([some[0]] * 12, judge.read([some[0]] * 12))
    assert flat["diversity"] < 0.01 and flat["recall"] < 0.5 and flat["frechet"] > found["frechet"]
    with pytest.raises(DataError, match="12 pictures for 1 prompts"):
        Real(judge, some).measure(some, [{}])


def test_a_judge_is_told_what_its_task_asks_for_beside_the_picture(judge: Judge) -> None:
    told = Task.from_instruction("[image:photo] [text:kind] -> [label:colour|set=红,蓝]", "of")
    session = Session(judge.session.model, judge.session.processor, [told])
    of, some = Judge(session, "of", batch_size=4), pictures(6)
    wanted = [{"kind": "鞋" if i % 2 else "包", "colour": "红"} for i in range(6)]
    alone = [session.run("of", photo=one, kind=wish["kind"]) for one, wish in zip(some, wanted, strict=True)]
    rows = judged(of, some, wanted)
    assert [row["colour"] for row in rows] == [answer == "红" for answer in alone]
    features = of.features(some, wanted)
    other = of.features(some, [{**wish, "kind": "鞋鞋"} for wish in wanted])
    assert not torch.isclose(features, other).all(1).any()
    assert Real(of, some, wanted).measure(some, wanted)["frechet"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(DataError, match="kind is missing"):
        of.read(some)


def test_a_judge_looks_at_one_picture(judge: Judge) -> None:
    judge.session.tasks["two"] = Task.from_instruction("[image:a] [image:b] -> [label:kind|set=鞋,包]", "two")
    with pytest.raises(UsageError, match="The task two has 2 picture slots: a judge needs one"):
        Judge(judge.session, "two")


def test_a_sheet_shows_pictures_side_by_side(tmp_path: Path) -> None:
    some = pictures(5)
    target = tmp_path / "a" / "sheet.png"
    draw_sheet(some, target, columns=3, rows=2, scale=1)
    sheet = np.asarray(Image.open(target))
    assert sheet.shape == (32, 48, 3)
    assert np.array_equal(sheet[16:, 16:32], np.asarray(some[4]))
    assert (sheet[16:, 32:] == 255).all()

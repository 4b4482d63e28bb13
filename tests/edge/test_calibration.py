"""Calibration of the confidence: fitted, updated, and saved in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import OpenM6Error
from openm6.edge.calibration import Audits, ConfidenceCalibrator, Drift, agreement


def _records(count: int, seed: int, shifted: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, confidences, and whether answers are right. A share `shifted` of the records lies elsewhere: there
    answers are confident, and wrong."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(count, 24)) @ np.diag(np.linspace(3, 0.1, 24))
    hard = rng.random(count) < 0.1
    confidences = np.where(hard, rng.uniform(0.3, 0.9, count), rng.uniform(0.9, 0.999, count))
    right = np.where(hard, rng.random(count) < 0.5, rng.random(count) < 0.995).astype(float)
    strange = rng.random(count) < shifted
    states[strange] += 8 * np.eye(24)[20]
    confidences[strange] = rng.uniform(0.97, 0.999, strange.sum())
    right[strange] = 0
    return states.astype(np.float32), confidences, right


def test_what_is_not_sure_is_asked() -> None:
    sure = ConfidenceCalibrator.fit(*_records(1000, 0), max_loss=0.01)
    states, confidences, right = _records(4000, 1)
    chances = np.array([sure.probability(sure.seen(s, c)) for s, c in zip(states, confidences, strict=True)])
    given_ = chances >= sure.threshold
    assert (1 - right)[given_].sum() / len(right) < 0.02
    assert 0.01 < 1 - given_.mean() < 0.2
    assert right.mean() < 0.96
    # The probability is one: among answers of about the same, as many are right.
    for low, high in ((0.3, 0.7), (0.9, 1.0)):
        some = (chances >= low) & (chances < high)
        assert right[some].mean() == pytest.approx(chances[some].mean(), abs=0.1)


def test_it_learns_of_what_comes_in_anew() -> None:
    """A fifth of what comes is confident and wrong, which no record of calibration was."""
    sure = ConfidenceCalibrator.fit(*_records(500, 0), max_loss=0.01)
    states, confidences, right = _records(3000, 2, shifted=0.2)
    rng, wrong, asked = np.random.default_rng(3), np.zeros(3000), np.zeros(3000)
    for number, (state, confidence) in enumerate(zip(states, confidences, strict=True)):
        seen = sure.seen(state, confidence)
        kept = sure.probability(seen) >= sure.threshold
        share = 0.05
        audited = kept and rng.random() < share
        if not kept or audited:
            sure.learn(seen, right[number], 1 / share if audited else 1.0)
            asked[number] = 1
        else:
            wrong[number] = 1 - right[number]
    assert wrong[2000:].mean() < 0.02 < wrong[:200].mean()
    assert asked[2000:].mean() < 0.6  # a third has to be


def test_the_less_sure_are_audited_the_more() -> None:
    rng, audits = np.random.default_rng(0), Audits()
    chances = 1 - 10 ** rng.uniform(-4, -0.5, 5000)
    shares = np.array([audits.rate(float(chance), 0.05) for chance in chances])
    assert shares[1000:].mean() == pytest.approx(0.05, rel=0.25)  # a quarter at least of each: somewhat more
    assert shares[1000:].min() >= 0.05 / 4
    assert shares[chances > 0.999].max() < shares[chances < 0.9].min() / 3
    assert shares[chances < 0.8].min() > 2 * 0.05
    assert Audits().rate(0.9, 1.0) == 1.0


def test_a_file_says_the_same(tmp_path: Path) -> None:
    records = _records(200, 4)
    sure = ConfidenceCalibrator.fit(*records, max_loss=0.01)
    sure.save(tmp_path / "sure.npz", "package")
    again = ConfidenceCalibrator.load(tmp_path / "sure.npz", "package")
    seen = sure.seen(np.ones(24, np.float32), 0.7)
    assert again.threshold == sure.threshold and again.probability(seen) == sure.probability(seen)
    assert again.confidences == pytest.approx(np.asarray(records[1]), abs=1e-5)
    assert again.expected() == sure.expected()
    assert again.expected()["wrong"] <= 0.01


def test_a_file_that_is_damaged_or_of_another_package_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "calibration-vqa.npz"
    sure = ConfidenceCalibrator.fit(*_records(60, 4), max_loss=0.01)
    sure.save(file, "one")
    with pytest.raises(OpenM6Error, match="calibration-vqa.npz was fitted to another ONNX bundle: calibrate again"):
        ConfidenceCalibrator.load(file, "another")
    content = file.read_bytes()
    for place in range(0, len(content), 97):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            again = ConfidenceCalibrator.load(file, "one")  # where the byte was not of the content: the time of a part
        except OpenM6Error as error:
            assert "calibrate again" in str(error)
        else:
            assert again.max_loss == sure.max_loss
            assert all(np.array_equal(again.parts[name], part) for name, part in sure.parts.items())
    file.write_bytes(content[:-200])
    with pytest.raises(OpenM6Error, match="is damaged"):
        ConfidenceCalibrator.load(file, "one")


@given(st.integers(0, 1000), st.integers(50, 120), st.floats(0.0, 1.0))
def test_any_records_can_be_fitted(seed: int, count: int, good: float) -> None:
    """All right, all wrong, alike states: a threshold comes out all the same."""
    rng = np.random.default_rng(seed)
    states = np.repeat(rng.normal(size=(1, 8)), count, 0) + rng.normal(size=(count, 8)) * rng.choice([0, 1e-3, 1])
    right = (rng.random(count) < good).astype(float)
    sure = ConfidenceCalibrator.fit(states.astype(np.float32), rng.uniform(0, 1, count), right, 0.01)
    chance = sure.probability(sure.seen(states[0].astype(np.float32), 0.5))
    assert 0 <= chance <= 1 and 0 <= sure.threshold <= 1.01
    assert np.isfinite(list(sure.expected().values())).all()


def test_drift_is_seen() -> None:
    rng = np.random.default_rng(0)
    before = rng.beta(20, 1, 500)
    same, other = Drift(before), Drift(before)
    for one in rng.beta(20, 1, 500):
        same.see(one)
    assert other.index == 0.0
    for one in rng.beta(3, 2, 300):
        other.see(one)
    assert same.index < 0.1 < 0.5 < other.index


def test_agreement() -> None:
    assert agreement("红色", " 红色 ") == 1.0
    assert agreement("红色", "蓝色") == 0.0
    assert agreement("红色", ["蓝色", "红色"]) == 1.0
    assert agreement(3, 3) == agreement([1, 2], [1, 2]) == agreement(np.array([1, 2]), [1, 2]) == 1.0
    assert agreement({"a": "红", "b": "蓝"}, {"a": "红", "b": "绿"}) == 0.5
    assert 0.5 < agreement("图中是一件红色的连衣裙。", "图中有一件红色的连衣裙。") < 1.0
    assert agreement("图中是一件红色的连衣裙。", "今天的天气非常好啊啊。") < 0.1
    assert agreement("红色", None) == 0.0

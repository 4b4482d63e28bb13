"""Calibration of an edge model's confidence for selective prediction: the probability that an answer is right, and the
threshold from which on it is given locally.

A logistic function of the model's confidence and of its state at the end of a prompt:

    logit(confidence), log of the distance, PARTS coordinates

The confidence is the geometric mean of the probabilities of the written tokens. Distance and coordinates are those of
the network's state among the states of calibration: its principal components, each scaled to a standard deviation of 1,
and the residual. They reveal a confident answer about an unfamiliar input (Mahalanobis distance: Lee et al. 2018,
arXiv 1807.03888).

The function is fitted to records with answers, and goes on learning from the cloud's answers. Answers above the
threshold are audited at random (`Audits`) and weighted by the inverse of their audit rate, so that the threshold moves
when the requests change, where a table made once would go on trusting. Nothing here needs more than numpy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import OpenM6Error
from openm6.core.files import plain

PARTS = 16
WINDOW = 2000
"""Number of the cloud's newest answers that are remembered."""
LATELY = 500
"""Number of the newest requests among which the least confident are deferred, under a deferral rate."""
PRIOR = 200.0
"""Total weight of the calibration records, in requests, beside the cloud's answers."""
RIDGE = (1.0, 10.0)
"""Ridge penalties: of confidence and distance towards weights of 1 and -1, of coordinates towards 0."""
STEADY = 0.2
"""Population stability index up to which requests count as distributed like the calibration records."""
BINS = np.array([0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999])

Array = np.ndarray


class ConfidenceCalibrator:
    """The confidence calibrator of one task. `threshold`: the probability from which on an answer is given locally;
    `confidences`: of the calibration records, [N]."""

    def __init__(self, parts: Mapping[str, Array], max_loss: float):
        """`parts` as `fit` makes them; `max_loss`: fraction of all answers that may be given locally and wrong."""
        self.parts, self.max_loss = dict(parts), max_loss
        self.confidences: Array = _logistic(parts["seen"][:, 1])
        self._live: list[tuple[Array, float, float]] = []
        self._lately = np.zeros((0, parts["seen"].shape[1]))
        self._weights, self.threshold = np.zeros(0), 1.0
        self._refit()

    @classmethod
    def fit(cls, states: Array, confidences: Array, right: Array, max_loss: float) -> ConfidenceCalibrator:
        """A calibrator from records with answers: states fp32 [N, D], confidences [N], and correctness [N], 0 to 1."""
        middle = states.mean(0)
        _, sizes, axes = np.linalg.svd(states - middle, full_matrices=False)
        count = min(PARTS, max(1, len(states) // 8), states.shape[1])
        scale = np.maximum(sizes[:count] / np.sqrt(len(states)), 1e-6)
        rest = np.square(sizes[count:]).sum() / len(states)
        parts = {
            "middle": middle.astype(np.float32), "axes": axes[:count].astype(np.float32), "scale": scale,
            "rest": np.array(max(float(rest), 1e-6)), "right": right.astype(np.float64),
        }  # fmt: skip
        parts["seen"] = np.stack([_seen(parts, s, c) for s, c in zip(states, confidences, strict=True)])
        return cls(parts, max_loss)

    def seen(self, state: Array, confidence: float) -> Array:
        """The inputs of the logistic function, [3 + PARTS]."""
        return _seen(self.parts, state, confidence)

    def probability(self, seen: Array) -> float:
        """The probability that an answer is right."""
        return float(_logistic(seen @ self._weights))

    def bound(self, seen: Array, rate: float) -> float:
        """The probability below which this fraction of the newest requests lies, this one included. The threshold with
        a rate of 0, and while there are too few requests."""
        if not rate:
            return self.threshold
        self._lately = np.vstack((self._lately, seen))[-LATELY:]
        if len(self._lately) < LATELY // 10:
            return self.threshold
        return float(_logistic(np.quantile(self._lately @ self._weights, rate, method="lower")))

    def learn(self, seen: Array, right: float, weight: float = 1.0) -> None:
        """Learn how right, 0 to 1, an answer was that stands for `weight` requests."""
        self._live.append((seen, right, weight))
        del self._live[:-WINDOW]
        # Fitting takes milliseconds: at every answer at first, then less often.
        if len(self._live) % max(1, min(20, len(self._live) // 10)) == 0:
            self._refit()

    def remember(self, live: list[tuple[Array, float, float]]) -> None:
        """Restore learned answers: (seen, right, weight), the oldest first."""
        self._live = live[-WINDOW:]
        self._refit()

    def expected(self) -> dict[str, float]:
        """Fractions of all requests, estimated from the known answers: deferred (`sent`), answered locally and wrong
        (`wrong`), and answered right by the edge model alone (`alone`)."""
        seen, right, weight = self._pairs()
        kept = _logistic(seen @ self._weights) >= self.threshold
        whole = weight.sum()
        return {
            "sent": float((weight * ~kept).sum() / whole), "wrong": float((weight * kept * (1 - right)).sum() / whole),
            "alone": float((weight * right).sum() / whole),
        }  # fmt: skip

    def _pairs(self) -> tuple[Array, Array, Array]:
        seen, right = self.parts["seen"], self.parts["right"]
        weight = np.full(len(right), PRIOR / len(right))
        if self._live:
            seen = np.concatenate((seen, np.stack([one[0] for one in self._live])))
            right = np.concatenate((right, [one[1] for one in self._live]))
            weight = np.concatenate((weight, [one[2] for one in self._live]))
        return seen, right, weight

    def _refit(self) -> None:
        seen, right, weight = self._pairs()
        self._weights = _fit(seen, right, weight)
        chances = _logistic(seen @ self._weights)
        order = np.argsort(-chances)
        # Counted, not estimated by the function, which expects too many errors near its upper end.
        lost = np.cumsum((weight * (1 - right))[order]) / weight.sum()
        place = int(np.searchsorted(lost, self.max_loss, "right"))
        # Even where all may be given, an answer that is less confident than any of them is deferred.
        self.threshold = float(chances[order[place - 1]]) if place else 1.01

    def save(self, file: Path, package: str) -> None:
        """`package`: SHA-256 of the ONNX bundle (edge.json) whose answers it was fitted to."""
        with file.open("wb") as stream:
            np.savez(stream, max_loss=np.array(self.max_loss), package=np.array(package), **self.parts)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: Path, package: str) -> ConfidenceCalibrator:
        """Raises OpenM6Error for a damaged file, or one that was fitted to another ONNX bundle."""
        try:
            with np.load(file, allow_pickle=False) as kept:
                parts = {name: kept[name] for name in kept.files}
            fitted_to, max_loss = str(parts.pop("package")), float(parts.pop("max_loss"))
            if fitted_to == package:
                return cls(parts, max_loss)
        except Exception:  # numpy and zipfile raise many kinds of errors for a damaged file
            raise OpenM6Error(f"{file} is damaged: calibrate again (openm6 cascade calibrate).") from None
        raise OpenM6Error(f"{file} was fitted to another ONNX bundle: calibrate again (openm6 cascade calibrate).")


class Audits:
    """Audit rates of confident answers, in proportion to the standard deviation sqrt(p (1 - p)) of the outcome, which
    is the most informative choice for a given number of audits (Neyman 1934), but at least a quarter of the mean, which
    bounds the weight of a single answer."""

    def __init__(self) -> None:
        self._count, self._mean = 0, 0.0

    def rate(self, probability: float, mean: float) -> float:
        """The audit rate of an answer that is right with this probability, where `mean` is the rate of all."""
        spread = float(np.sqrt(max(probability * (1 - probability), 1e-12)))
        self._count += 1
        self._mean += (spread - self._mean) * max(1 / self._count, 0.01)
        return min(1.0, max(mean / 4, mean * spread / self._mean))


class Drift:
    """Drift of the confidences since calibration: the population stability index of the newest ones."""

    def __init__(self, before: Array, window: int = 500):
        self._before = _shares(before)
        self._window, self._newest = window, np.zeros(0)

    def see(self, confidence: float) -> None:
        self._newest = np.append(self._newest, confidence)[-self._window :]

    @property
    def index(self) -> float:
        """0 without drift, and for fewer than 50 confidences."""
        if len(self._newest) < 50:
            return 0.0
        now = _shares(self._newest)
        return float(((now - self._before) * np.log(now / self._before)).sum())


def calibrations(package: Path) -> dict[str, Path]:
    """Calibration files of an ONNX bundle, by task."""
    return {file.stem.removeprefix("calibration-"): file for file in sorted(package.glob("calibration-*.npz"))}


def _shares(confidences: Array) -> Array:
    counts = np.bincount(np.searchsorted(BINS, confidences), minlength=len(BINS) + 1) + 0.5
    return counts / counts.sum()


def _seen(parts: Mapping[str, Array], state: Array, confidence: float) -> Array:
    off = state.astype(np.float64) - parts["middle"]
    along = parts["axes"] @ off
    rest = max(float(off @ off - along @ along), 0.0) / float(parts["rest"])
    coordinates = along / parts["scale"]
    # Both sums have a mean of 1 for each of their parts among the states of calibration.
    distance = np.sqrt((np.square(coordinates).sum() + len(along) * rest) / (2 * len(along)))
    chance = min(max(confidence, 1e-6), 1 - 1e-6)
    return np.concatenate(([1.0, np.log(chance / (1 - chance)), 4 * np.log(distance + 1e-6)], coordinates))


def _logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _fit(seen: Array, right: Array, weight: Array) -> Array:
    """Weights of the logistic function by Newton's method with step halving."""
    size = seen.shape[1]
    pull = np.concatenate(([1e-6], np.full(2, RIDGE[0]), np.full(size - 3, RIDGE[1])))
    towards = np.concatenate(([0.0, 1.0, -1.0], np.zeros(size - 3)))
    found = towards

    def cost(weights: Array) -> float:
        margin = seen @ weights
        fit = weight * (np.logaddexp(0, margin) - right * margin)
        return float(fit.sum() + 0.5 * (pull * np.square(weights - towards)).sum())

    before = cost(found)
    for _ in range(50):
        chances = _logistic(seen @ found)
        slope = seen.T @ (weight * (chances - right)) + pull * (found - towards)
        bend = (seen * (weight * chances * (1 - chances))[:, None]).T @ seen + np.diag(pull + 1e-6)
        step, share = np.linalg.solve(bend, slope), 1.0
        while cost(found - share * step) > before and share > 1e-4:
            share /= 2
        found = found - share * step
        now = cost(found)
        if before - now < 1e-6 * abs(before):
            break
        before = now
    return found


def agreement(answer: Any, other: Any) -> float:
    """Similarity of two answers, 0 to 1: equality, or for longer texts the F1 of their character bigrams."""
    if isinstance(other, (list, tuple)) and isinstance(answer, str):
        return max((agreement(answer, one) for one in other), default=0.0)
    if isinstance(answer, Mapping) and isinstance(other, Mapping):
        names = answer.keys() | other.keys()
        return float(np.mean([agreement(answer.get(n), other.get(n)) for n in names])) if names else 1.0
    if not (isinstance(answer, str) and isinstance(other, str)):
        return float(_plain(answer) == _plain(other))
    first, second = answer.strip(), other.strip()
    if first == second or min(len(first), len(second)) < 8:
        return float(first == second)
    pairs = [Counter(text[i : i + 2] for i in range(len(text) - 1)) for text in (first, second)]
    return 2 * (pairs[0] & pairs[1]).total() / (pairs[0].total() + pairs[1].total())


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=plain)

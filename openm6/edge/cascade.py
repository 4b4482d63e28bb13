"""An answer from here where it is sure enough, else from the cloud: within a budget, a deadline, what may be sent."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openm6.edge.box import EYES, Box
from openm6.edge.cloud import Cloud, Failed
from openm6.edge.kept import ALL, FEATURES, NOTHING, Kept, open_kept
from openm6.edge.runner import Answer, EdgeModel, Eyes
from openm6.edge.sureness import STEADY, WINDOW, Audits, Drift, Sureness, agreement, confidence_of
from openm6.errors import DataError, OpenM6Error
from openm6.images import as_file, open_image
from openm6.tasks.task import Task

EDGE, CLOUD = "edge", "cloud"
EAGER, LATER = 30.0, 12.0
"""Of the first requests of a task more are audited, EAGER / (20 + n) of the n-th, until that is less than the settings'
share: what comes in may be other than what was calibrated on. LATER for a version that learned here: it was calibrated
on what came in too."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """A value, who gave it (edge or cloud), how probably the edge's own answer is right (None: it was not calibrated),
    and, where an answer that is not sure was given all the same, why."""

    value: Any
    by: str
    probability: float | None = None
    reason: str = ""
    finished: bool = True


class _Version:
    """A version of a box, opened."""

    def __init__(self, box: Box, number: str, kept: Kept, threads: int):
        folder = box.folder(number) / "package"
        self.number, self.model = number, EdgeModel(folder, threads)
        self.eager = EAGER if int(number) == 1 else LATER
        self.sure: dict[str, Sureness] = {}
        self.drift: dict[str, Drift] = {}
        self.audits: dict[str, Audits] = {}
        for file in folder.glob("sureness-*.npz"):
            task = file.stem.removeprefix("sureness-")
            self.sure[task] = found = Sureness.load(file, self.model.about["sha256"])
            self.drift[task] = Drift(confidence_of(found.parts["seen"]))
            self.audits[task] = Audits()
            found.remember(kept.seen(task, number))


class Cascade:
    """A box in use. Several threads may ask; a version that is promoted meanwhile answers from then on."""

    def __init__(
        self,
        path: str | Path,
        threads: int = 0,
        cloud: Cloud | None = None,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """Raises UsageError or OpenM6Error for a box that cannot be used."""
        self.box, self._threads, self._clock = Box(path), threads, clock
        settings = self.settings = self.box.settings
        self.kept = open_kept(self.box.path, settings)
        self.cloud = cloud
        if cloud is None and settings.cloud and settings.privacy != NOTHING:
            self.cloud = Cloud(settings.cloud, os.environ.get(settings.key, "") if settings.key else "", settings.model)
        eyes = self.box.path / EYES
        self.eyes = Eyes(eyes, threads) if settings.privacy == FEATURES and eyes.is_dir() else None
        self._version = _Version(self.box, self.box.version, self.kept, threads)
        self._looked = 0.0
        self._lock, self._random = threading.Lock(), random.Random(seed)
        self.counts: dict[str, Counter[str]] = {}
        self._spent: tuple[int | None, int] = (None, 0)  # an hour, and its requests
        self.started = clock()

    def close(self) -> None:
        if self.cloud is not None:
            self.cloud.close()
        self.kept.close()

    @property
    def model(self) -> EdgeModel:
        return self._newest().model

    def answer(self, task: str, record: Record, seconds: float | None = None) -> Reply:
        """One answer, whatever becomes of the cloud. `seconds`: a deadline that is shorter than the settings'.

        Raises UsageError or DataError for a record that cannot be used.
        """
        version = self._newest()
        chosen = version.model.task(task)
        record = _whole(chosen, record)
        own = version.model.answer(task, record)
        sure = version.sure.get(task)
        if sure is None or own.state is None:
            self._count(task, "asked", "uncalibrated")
            return Reply(own.value, EDGE, None, "", own.finished)
        seen = sure.seen(own.state, own.confidence)
        with self._lock:
            version.drift[task].see(own.confidence)
            probability = sure.probability(seen)
            confident = probability >= sure.threshold
            given = probability >= sure.bound(seen, self.settings.least_sure)
            asked = self.counts.get(task, Counter())["asked"]
            # Only a threshold has to be found out early.
            eager = 0.0 if self.settings.share else version.eager
            share = max(self.settings.audit, min(1.0, eager / (20 + asked)))
            if given:
                share = version.audits[task].share(probability, share)
            audited = given and self._random.random() < share
        weight = 1 / share if audited else 1.0  # requests that it stands for
        self._count(task, "asked", *(["sure"] if confident else ["spared"] if given else []))
        reason = "" if confident else f"no more than {self.settings.share:.0%} may be asked"
        if given and not audited:
            return Reply(own.value, EDGE, probability, reason, own.finished)

        def learn(value: Any) -> None:
            right = agreement(own.value, value)
            self._count(task, *(["agreed"] if right >= 0.5 else ["differed"]), *(["audited"] if audited else []))
            with self._lock:
                sure.learn(seen, right, weight)
            self._keep(version, chosen, record, value, own, seen, right, weight)

        try:
            value = self._ask(version, chosen, record, seconds, learn)
        except Failed as error:
            self._count(task, "unanswered")
            # An answer that was merely to be checked needs no other excuse.
            return Reply(own.value, EDGE, probability, reason if given or confident else str(error), own.finished)
        learn(value)
        return Reply(value, CLOUD, probability)

    def _ask(
        self, version: _Version, task: Task, record: Record, seconds: float | None, late: Callable[[Any], None]
    ) -> Any:
        """The cloud's value of a task. Raises Failed with the reason why there is none."""
        settings = self.settings
        if settings.privacy == NOTHING:
            raise Failed("nothing may be sent")
        if settings.offline or self.cloud is None:
            raise Failed("offline")
        inputs = task.asked(record)
        pictures = [name for name in inputs if task.slots[name].type == "image"]
        if settings.privacy == FEATURES and pictures:
            if self.eyes is None:
                raise Failed("the box has not the cloud's eyes, to send features")
            inputs |= {name: self.eyes.features(inputs[name]).mapping() for name in pictures}
        self._spend()
        deadline = settings.deadline_ms / 1000
        self._count(task.name, "sent")
        outputs = self.cloud.ask(
            task.name, inputs, min(deadline, seconds or deadline), lambda found: _maybe(late, task, found)
        )
        return _value(task, outputs)

    def _spend(self) -> None:
        """Raises Failed where the hour's requests are used up. On a full disk they are counted in memory alone."""
        hour = int(self._clock() // 3600)
        with self._lock:
            known, used = self._spent
            if known != hour:
                used = self.kept.spent(hour)
            if used >= self.settings.requests_per_hour:
                raise Failed("this hour's requests to the cloud are used up")
            self._spent = hour, used + 1
        try:
            self.kept.spend(hour)
        except (OSError, sqlite3.Error):
            self._count("", "unwritten")

    def _keep(
        self, version: _Version, task: Task, record: Record, value: Any, own: Answer, seen: np.ndarray, right: float,
        weight: float,
    ) -> None:  # fmt: skip
        """What is kept is never worth a request: where the disk is full, or damaged, it is counted, and that is all."""
        try:
            kept = task.asked(record)
            if self.settings.privacy != ALL:
                for name in kept:
                    if task.slots[name].type == "image":
                        kept[name] = version.model.eyes.features(record[name]).mapping()
            self.kept.keep(task.name, kept, value, own.value)
            self.kept.saw(task.name, version.number, seen, right, weight, WINDOW)
        except (OSError, sqlite3.Error):
            self._count(task.name, "unwritten")

    def _newest(self) -> _Version:
        """The version that is to answer, looked up every second."""
        now = time.monotonic()
        if now - self._looked > 1.0:
            self._looked = now
            try:
                number = self.box.version
                if number != self._version.number:
                    self._version = _Version(self.box, number, self.kept, self._threads)
                    self.counts = {}
            except OpenM6Error:
                self._count("", "unreadable")  # the one that is open goes on answering
        return self._version

    def _count(self, task: str, *names: str) -> None:
        with self._lock:
            counts = self.counts.setdefault(task, Counter())
            for name in names:
                counts[name] += 1

    # Telling

    def statistics(self) -> dict[str, Any]:
        """Counts and averages, nothing of what was asked or answered."""
        version = self._version
        with self._lock:
            tasks = {}
            for task, counts in self.counts.items():
                told: dict[str, Any] = dict(counts)
                if task in version.sure:
                    index = version.drift[task].index
                    told |= {
                        "threshold": round(version.sure[task].threshold, 4), "drift": round(index, 4),
                        **{f"expected_{n}": round(v, 4) for n, v in version.sure[task].expected().items()},
                    }  # fmt: skip
                tasks[task or "box"] = told
        return {"version": version.number, "seconds": round(self._clock() - self.started), "tasks": tasks}

    def drifting(self) -> list[str]:
        """Tasks whose requests come otherwise than in calibration."""
        return [task for task, drift in self._version.drift.items() if drift.index > STEADY]

    def report(self) -> None:
        """Tell the cloud the counts. Raises Failed; nothing is sent where nothing may be."""
        settings = self.settings
        if self.cloud is not None and settings.privacy != NOTHING and not settings.offline:
            self.cloud.tell(settings.name, self.statistics())


def _whole(task: Task, record: Record) -> dict[str, Any]:
    """With the pictures of paths read: they are looked at, sent and kept as they are now. Raises DataError."""
    found = dict(record)
    for name, slot in task.slots.items():
        value = found.get(name)
        if slot.type == "image" and value is not None and not isinstance(value, Mapping):
            try:
                found[name] = as_file(value if isinstance(value, (bytes, str, Path)) else open_image(value))
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
    return found


def _value(task: Task, outputs: Mapping[str, Any]) -> Any:
    """A task's value as the edge's model gives it. Raises Failed for outputs of another task by that name."""
    if any(name not in outputs for name in task.outputs):
        raise Failed("the cloud answers otherwise than expected")
    for name, known in task.labels.items():
        if name in task.outputs and str(outputs[name]) not in known:
            raise Failed("the cloud answers otherwise than expected")
    values = {name: outputs[name] for name in task.outputs}
    return values if len(values) > 1 else next(iter(values.values()))


def _maybe(late: Callable[[Any], None], task: Task, outputs: Mapping[str, Any]) -> None:
    with suppress(Failed):
        late(_value(task, outputs))

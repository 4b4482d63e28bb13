"""An answer from here where it is sure enough, else from the cloud: within a budget, a deadline, what may be sent."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.images import as_file, open_image
from openm6.edge.box import Box
from openm6.edge.check import Finding, check_cloud
from openm6.edge.cloud import CHOSEN, Failed
from openm6.edge.kept import Kept, StoreError, is_empty
from openm6.edge.live import LiveSettings
from openm6.edge.runner import Answer, EdgeModel
from openm6.edge.settings import ALL, FEATURES, NOTHING, Settings
from openm6.edge.sureness import STEADY, WINDOW, Audits, Drift, Sureness, agreement, calibrations, confidence_of
from openm6.tasks.processor import Processor
from openm6.tasks.slots import TYPES
from openm6.tasks.task import Task

log = logging.getLogger("openm6.edge")
EDGE, CLOUD = "edge", "cloud"
EAGER, LATER = 30.0, 12.0
"""Of the first requests of a task more are audited, EAGER / (20 + n) of the n-th, until that is less than the settings'
share: what comes in may be other than what was calibrated on. LATER for a version that learned here: it was calibrated
on what came in too."""

SELDOM = 600.0
"""Seconds between two lines of the log about one kind of failure."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """A value, who gave it (edge or cloud), how probably the edge's own answer is right (None: it was not calibrated),
    where an answer that is not sure was given all the same, why, and how many positions of the prompt were left out."""

    value: Any
    by: str
    probability: float | None = None
    reason: str = ""
    finished: bool = True
    truncated: int = 0


class _Version:
    """A version of a box, opened."""

    def __init__(self, box: Box, number: str, kept: Kept, threads: int):
        folder = box.folder(number) / "package"
        self.calibrated = _calibrated(box, number)
        self.number, self.model = number, EdgeModel(folder, threads)
        self.eager = EAGER if int(number) == 1 else LATER
        self.sure: dict[str, Sureness] = {}
        self.drift: dict[str, Drift] = {}
        self.audits: dict[str, Audits] = {}
        for task, file in calibrations(folder).items():
            self.sure[task] = found = Sureness.load(file, self.model.about["sha256"])
            self.drift[task] = Drift(confidence_of(found.parts["seen"]))
            self.audits[task] = Audits()
            with suppress(StoreError):  # without it the version still answers, by its calibration
                found.remember(kept.seen(task, number))


def _calibrated(box: Box, number: str) -> dict[str, int]:
    """When each task of a version was calibrated (ns)."""
    return {task: file.stat().st_mtime_ns for task, file in calibrations(box.folder(number) / "package").items()}


class Cascade:
    """A box in use. Several threads may ask; a version that is promoted meanwhile answers from then on."""

    def __init__(
        self,
        path: str | Path,
        threads: int = 0,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """Raises UsageError or OpenM6Error for a box that cannot be used."""
        self.box, self._threads, self._clock = Box(path), threads, clock
        self.live = LiveSettings(self.box, threads)
        self._version = _Version(self.box, self.box.version, self.kept, threads)
        self._looked, self._opening = 0.0, threading.Lock()
        self._lock, self._random = threading.Lock(), random.Random(seed)
        self.counts: dict[str, Counter[str]] = {}
        self._spent: tuple[int | None, int] = (None, 0)  # an hour, and its requests
        self._warned: dict[str, float] = {}
        self.started = clock()

    def close(self) -> None:
        self.live.close()

    @property
    def settings(self) -> Settings:
        return self.live.follow().settings

    @property
    def kept(self) -> Kept:
        return self.live.follow().kept

    @property
    def version(self) -> str:
        """The number of the version that answers."""
        return self._newest().number

    @property
    def model(self) -> EdgeModel:
        return self._newest().model

    def answer(self, task: str, record: Record, seconds: float | None = None, truncate: str | None = None) -> Reply:
        """One answer, whatever becomes of the cloud. `seconds`: a deadline that is shorter than the settings';
        `truncate`: see `EdgeModel.answer`.

        Raises UsageError or DataError for a record that cannot be used.
        """
        version = self._newest()
        chosen = version.model.task(task)
        record = _whole(chosen, record)
        own = version.model.answer(task, record, truncate=truncate)
        sure = version.sure.get(task)
        if sure is None or own.state is None:
            self._count(task, "asked", "uncalibrated")
            return Reply(own.value, EDGE, None, "", own.finished, own.truncated)
        seen, settings = sure.seen(own.state, own.confidence), self.settings
        with self._lock:
            version.drift[task].see(own.confidence)
            probability = sure.probability(seen)
            confident = probability >= sure.threshold
            given = probability >= sure.bound(seen, settings.least_sure)
            asked = self.counts.get(task, Counter())["asked"]
            # Only a threshold has to be found out early.
            eager = 0.0 if settings.share else version.eager
            share = max(settings.audit, min(1.0, eager / (20 + asked)))
            if given:
                share = version.audits[task].share(probability, share)
            audited = given and self._random.random() < share
        weight = 1 / share if audited else 1.0  # requests that it stands for
        self._count(task, "asked", *(["sure"] if confident else ["spared"] if given else []))
        reason = "" if confident else f"no more than {settings.share:.0%} may be asked"
        if given and not audited:
            return Reply(own.value, EDGE, probability, reason, own.finished, own.truncated)

        def learn(value: Any) -> None:
            right = agreement(own.value, value)
            self._count(task, *(["agreed"] if right >= 0.5 else ["differed"]), *(["audited"] if audited else []))
            with self._lock:
                sure.learn(seen, right, weight)
            self._keep(version, chosen, record, value, own, seen, right, weight)

        def receive(answer: Mapping[str, Any]) -> Any:
            """The cloud's value, from which this box learns unless it was cut off. Raises Failed."""
            value = _value(chosen, answer["outputs"], version.model.processor)
            if answer.get("finished", True):
                learn(value)
            else:
                self._count(task, "unfinished")
            return value

        try:
            answer = self._ask(chosen, record, seconds, truncate, receive)
            cut, finished = answer.get("truncated"), bool(answer.get("finished", True))
            return Reply(receive(answer), CLOUD, probability, "", finished, cut if isinstance(cut, int) else 0)
        except Failed as error:
            self._count(task, "unanswered", f"unanswered_{error.kind}")
            if error.kind not in CHOSEN:
                self._warn(error.kind, str(error))
            # An answer that was merely to be checked needs no other excuse.
            reason = reason if given or confident else str(error)
            return Reply(own.value, EDGE, probability, reason, own.finished, own.truncated)

    def _ask(
        self, task: Task, record: Record, seconds: float | None, truncate: str | None,
        receive: Callable[[Mapping[str, Any]], Any],
    ) -> Mapping[str, Any]:  # fmt: skip
        """The cloud's answer; `receive` gets one that comes too late. Raises Failed with the reason for none."""
        now = self.live.follow()
        settings = now.settings
        if now.problem:
            raise Failed("settings")
        if settings.privacy == NOTHING:
            raise Failed("privacy")
        if now.cloud is None:
            raise Failed("offline")
        inputs = task.asked(record)
        pictures = [name for name in inputs if task.slots[name].type == "image"]
        if settings.privacy == FEATURES and pictures:
            if now.eyes is None:
                raise Failed("no_eyes")
            inputs |= {name: now.eyes.features(inputs[name]).mapping() for name in pictures}
        deadline = settings.deadline_ms / 1000
        self._take(0)

        def late(answer: Mapping[str, Any]) -> None:
            with suppress(Failed):
                receive(answer)

        seconds = min(deadline, seconds or deadline)
        return now.cloud.ask(task.name, inputs, seconds, late, lambda: self._spend(task.name), truncate)

    def _take(self, count: int) -> int:
        """Take so many of the hour's requests. Returns the hour. Raises Failed where they are used up."""
        hour = int(self._clock() // 3600)
        with self._lock:
            known, used = self._spent
            if known != hour:
                try:
                    used = self.kept.spent(hour)
                except StoreError:
                    used = 0
            self._spent = hour, used
            if used >= self.settings.requests_per_hour:
                raise Failed("budget")
            self._spent = hour, used + count
        return hour

    def _spend(self, task: str) -> None:
        """A request is about to leave. Raises Failed where the hour's requests are used up. On a full disk they are
        counted in memory alone."""
        hour = self._take(1)
        self._count(task, "sent")
        with self._storing(""):
            self.kept.spend(hour)

    def _keep(
        self, version: _Version, task: Task, record: Record, value: Any, own: Answer, seen: np.ndarray, right: float,
        weight: float,
    ) -> None:  # fmt: skip
        """What is kept is never worth a request: where the disk is full, or damaged, it is counted, and that is all."""
        kept = task.asked(record)
        with self._storing(task.name):
            store = self.kept
            if store.trouble and store.file is None:
                raise StoreError(store.trouble)
            if store.mode == NOTHING:
                return
            if store.mode != ALL:
                for name in kept:
                    if task.slots[name].type == "image":
                        kept[name] = version.model.eyes.features(record[name]).mapping()
            # Training shortens a text at its end: it would learn the answer without the part that was answered.
            if not own.truncated and (forgotten := store.keep(task.name, kept, value, own.value)):
                self._count(task.name, *["forgotten"] * forgotten)
            store.saw(task.name, version.number, seen, right, weight, WINDOW)

    @contextmanager
    def _storing(self, task: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            self._count(task, "unwritten")
            self._warn("unwritten", str(error))

    def _warn(self, kind: str, message: str) -> None:
        """Write a message into the log, of each kind once in a while."""
        now = time.monotonic()
        with self._lock:
            again = now - self._warned.get(kind, -SELDOM) >= SELDOM
            if again:
                self._warned[kind] = now
        if again:
            log.warning("%s", message)

    def _newest(self) -> _Version:
        """The version that is to answer, and its calibration, looked up every second."""
        now = time.monotonic()
        if now - self._looked <= 1.0 or not self._opening.acquire(blocking=False):
            return self._version
        try:
            self._looked, number = now, self.box.version
            is_new = number != self._version.number
            if is_new or _calibrated(self.box, number) != self._version.calibrated:
                self._version = _Version(self.box, number, self.kept, self._threads)
                log.info("version %s answers%s", number, "" if is_new else ", calibrated anew")
            if is_new:
                self.counts = {}
        except (OpenM6Error, OSError):
            self._count("", "unreadable")  # the one that is open goes on answering
        finally:
            self._opening.release()
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

    def check_cloud(self) -> Iterator[Finding]:
        """Try the key and the cloud, without a record; not any further once box.toml is changed."""
        now, version = self.live.follow(), self._version
        tasks = {task: version.model.tasks[task].outputs for task in version.sure}
        return check_cloud(Box.with_settings(self.box.path, now.settings), tasks, now.cloud)

    def report(self) -> None:
        """Tell the cloud the counts. Raises Failed; nothing is sent where nothing may be."""
        now = self.live.follow()
        if now.cloud is not None:
            now.cloud.tell(now.settings.name, self.statistics())


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


def _value(task: Task, outputs: Mapping[str, Any], processor: Processor) -> Any:
    """A task's value as the edge's model gives it. Raises Failed for outputs of another task by that name, and for what
    could not be learned."""
    values = {name: outputs[name] for name in task.outputs if name in outputs}
    for name in task.outputs:
        known, value = task.labels.get(name), values.get(name)
        if is_empty(value):
            raise Failed("empty")
        if value is None or (known and str(value) not in known):
            raise Failed("unexpected")
        try:
            written = TYPES[task.slots[name].type].target(value, processor)
        except (DataError, UsageError):
            raise Failed("unexpected") from None
        if not written:
            raise Failed("empty")
    return values if len(values) > 1 else next(iter(values.values()))

"""The cascade of an edge device: it answers locally where its model is confident enough, and defers the rest to the
cloud, within a budget, a deadline and a privacy mode."""

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
from openm6.edge.answer_store import AnswerStore, StoreError, is_empty
from openm6.edge.calibration import STEADY, WINDOW, Audits, ConfidenceCalibrator, Drift, agreement, calibrations
from openm6.edge.cloud import CHOSEN, CloudError
from openm6.edge.device import ALL, FEATURES, NOTHING, EdgeDevice, Settings
from openm6.edge.live import LiveSettings
from openm6.edge.runner import Answer, EdgeModel, file_digest
from openm6.edge.status import Finding, check_cloud
from openm6.tasks.processor import Processor
from openm6.tasks.record import labels_of
from openm6.tasks.slots import TYPES
from openm6.tasks.task import Task

log = logging.getLogger("openm6.edge")
EDGE, CLOUD = "edge", "cloud"
EAGER, LATER = 30.0, 12.0
"""Audit rate of a task's first requests, EAGER / (20 + n) for the n-th, while that is above the settings' rate:
requests may differ from the calibration records. LATER for a version that learned on this device, and was calibrated on
its requests too."""

SELDOM = 600.0
"""Seconds between two log lines about one kind of failure."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the cascade.

    value         the task's value
    by            EDGE or CLOUD
    probability   that the edge model's own answer is right; None without a calibration
    reason        why an answer below the threshold was given locally, else ""
    finished      whether a text came to its end by itself
    truncated     positions of the prompt that were left out
    """

    value: Any
    by: str
    probability: float | None = None
    reason: str = ""
    finished: bool = True
    truncated: int = 0


class _Version:
    """An open version of an edge device's model."""

    def __init__(self, device: EdgeDevice, number: str, kept: AnswerStore, threads: int):
        folder = device.folder(number) / "package"
        self.calibrated = _calibrated(device, number)
        self.number, self.model = number, EdgeModel(folder, threads)
        self.eager = EAGER if int(number) == 1 else LATER
        self.calibrators: dict[str, ConfidenceCalibrator] = {}
        self.drift: dict[str, Drift] = {}
        self.audits: dict[str, Audits] = {}
        self.digests: dict[str, str] = {}  # of the calibrations, each with coordinates of its own
        for task, file in calibrations(folder).items():
            self.calibrators[task] = found = ConfidenceCalibrator.load(file, self.model.about["sha256"])
            self.drift[task], self.audits[task] = Drift(found.confidences), Audits()
            self.digests[task] = file_digest(file)
            with suppress(StoreError):  # without it the version still answers, by its calibration
                found.remember(kept.seen(task, self.digests[task]))


def _calibrated(device: EdgeDevice, number: str) -> dict[str, int]:
    """Time of each task's calibration, in ns."""
    return {task: file.stat().st_mtime_ns for task, file in calibrations(device.folder(number) / "package").items()}


class Cascade:
    """An edge device in use, by several threads; a version that is promoted meanwhile answers from then on."""

    def __init__(
        self, path: str | Path, threads: int = 0, seed: int | None = None, clock: Callable[[], float] = time.time
    ):
        """`seed`: of the audits; `clock`: of the hourly budget. Raises UsageError or OpenM6Error for a device that
        cannot be used."""
        self.device, self._threads, self._clock = EdgeDevice(path), threads, clock
        self.live = LiveSettings(self.device, threads)
        self._version = _Version(self.device, self.device.version, self.kept, threads)
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
    def kept(self) -> AnswerStore:
        return self.live.follow().kept

    @property
    def version(self) -> str:
        """The number of the version that answers."""
        return self._newest().number

    @property
    def model(self) -> EdgeModel:
        return self._newest().model

    def answer(self, task: str, record: Record, seconds: float | None = None, truncate: str | None = None) -> Reply:
        """One answer, whatever happens to the cloud. `seconds`: a shorter deadline than the settings'; `truncate`: see
        `EdgeModel.answer`. Raises UsageError or DataError for a record that cannot be used."""
        version = self._newest()
        chosen = version.model.task(task)
        record = _whole(chosen, record)
        own = version.model.answer(task, record, truncate=truncate)
        calibrator = version.calibrators.get(task)
        if calibrator is None or own.state is None:
            self._count(task, "requests", "uncalibrated")
            return Reply(own.value, EDGE, None, "", own.finished, own.truncated)
        seen, settings = calibrator.seen(own.state, own.confidence), self.settings
        with self._lock:
            version.drift[task].see(own.confidence)
            probability = calibrator.probability(seen)
            is_confident = probability >= calibrator.threshold
            is_local = probability >= calibrator.bound(seen, settings.uncertain_rate)
            number = self.counts.get(task, Counter())["requests"]
            # Only a threshold has to be tested early.
            eager = 0.0 if settings.deferral_rate else version.eager
            rate = max(settings.audit_rate, min(1.0, eager / (20 + number)))
            if is_local:
                rate = version.audits[task].rate(probability, rate)
            is_audited = is_local and self._random.random() < rate
        weight = 1 / rate if is_audited else 1.0  # requests that an audited one stands for
        self._count(task, "requests", *(["confident"] if is_confident else ["spared"] if is_local else []))
        reason = "" if is_confident else f"no more than {settings.deferral_rate:.0%} may be deferred"
        if is_local and not is_audited:
            return Reply(own.value, EDGE, probability, reason, own.finished, own.truncated)

        def receive(answer: Mapping[str, Any]) -> Any:
            """The cloud's value, from which the device learns unless it was cut off. Raises CloudError."""
            value = _value(chosen, record, answer["outputs"], version.model.processor)
            if not answer.get("finished", True):
                self._count(task, "unfinished")
                return value
            right = agreement(own.value, value)
            self._count(task, *(["agreed"] if right >= 0.5 else ["differed"]), *(["audited"] if is_audited else []))
            with self._lock:
                calibrator.learn(seen, right, weight)
            self._keep(version, chosen, record, value, own, seen, right, weight)
            return value

        try:
            answer = self._ask(chosen, record, seconds, truncate, receive)
            cut, finished = answer.get("truncated"), bool(answer.get("finished", True))
            return Reply(receive(answer), CLOUD, probability, "", finished, cut if isinstance(cut, int) else 0)
        except CloudError as error:
            self._count(task, "unanswered", f"unanswered_{error.kind}")
            if error.concerns != CHOSEN:
                self._warn(error.kind, str(error))
            # An audit that failed is no reason for a local answer.
            reason = reason if is_local or is_confident else str(error)
            return Reply(own.value, EDGE, probability, reason, own.finished, own.truncated)

    def _ask(
        self, task: Task, record: Record, seconds: float | None, truncate: str | None,
        receive: Callable[[Mapping[str, Any]], Any],
    ) -> Mapping[str, Any]:  # fmt: skip
        """The cloud's answer; `receive` is also called with one that arrives too late. Raises CloudError."""
        now = self.live.follow()
        settings, deadline = now.settings, now.settings.deadline_ms / 1000
        if now.problem:
            raise CloudError("settings")
        if settings.privacy == NOTHING:
            raise CloudError("privacy")
        if now.cloud is None:
            raise CloudError("offline")
        inputs = task.asked(record)
        pictures = [name for name in inputs if task.slots[name].type == "image"]
        if settings.privacy == FEATURES and pictures:
            if now.image_encoder is None:
                raise CloudError("no_image_encoder")
            inputs |= {name: now.image_encoder.features(inputs[name]).mapping() for name in pictures}
        self._take(0)

        def late(answer: Mapping[str, Any]) -> None:
            with suppress(CloudError):
                receive(answer)

        most = min(deadline, seconds or deadline)
        return now.cloud.ask(task.name, inputs, most, late, lambda: self._spend(task.name), truncate)

    def _take(self, count: int) -> int:
        """Take so many of the hour's requests; return the hour. Raises CloudError where they are used up."""
        hour = int(self._clock() // 3600)
        with self._lock:
            known, used = self._spent
            if known != hour:
                used = 0
                with suppress(StoreError):
                    used = self.kept.spent(hour)
            self._spent = hour, used
            if used >= self.settings.requests_per_hour:
                raise CloudError("budget")
            self._spent = hour, used + count
        return hour

    def _spend(self, task: str) -> None:
        """Count a request that is about to be sent; on a full disk in memory alone. Raises CloudError where the hour's
        requests are used up."""
        hour = self._take(1)
        self._count(task, "deferred")
        with self._storing(""):
            self.kept.spend(hour)

    def _keep(
        self, version: _Version, task: Task, record: Record, value: Any, own: Answer, seen: np.ndarray, right: float,
        weight: float,
    ) -> None:  # fmt: skip
        """Store the cloud's answer. A full or damaged disk is counted, and never fails the request."""
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
                        kept[name] = version.model.image_encoder.features(record[name]).mapping()
            # Training truncates a text at its end: it would learn the answer without the part that was answered.
            if not own.truncated and (forgotten := store.keep(task.name, kept, value, own.value)):
                self._count(task.name, *["forgotten"] * forgotten)
            store.saw(task.name, version.digests[task.name], seen, right, weight, WINDOW)

    @contextmanager
    def _storing(self, task: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            self._count(task, "unwritten")
            self._warn("unwritten", str(error))

    def _warn(self, kind: str, message: str) -> None:
        """Log a message, one of each kind every SELDOM seconds."""
        now = time.monotonic()
        with self._lock:
            if now - self._warned.get(kind, -SELDOM) < SELDOM:
                return
            self._warned[kind] = now
        log.warning("%s", message)

    def _newest(self) -> _Version:
        """The version that answers; it and its calibration are looked up every second."""
        now = time.monotonic()
        if now - self._looked <= 1.0 or not self._opening.acquire(blocking=False):
            return self._version
        try:
            self._looked, number = now, self.device.version
            is_new = number != self._version.number
            if is_new or _calibrated(self.device, number) != self._version.calibrated:
                self._version = _Version(self.device, number, self.kept, self._threads)
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

    def statistics(self) -> dict[str, Any]:
        """Counts and averages by task; no inputs and no answers."""
        version = self._version
        with self._lock:
            tasks: dict[str, dict[str, Any]] = {}
            for task, counts in self.counts.items():
                tasks[task or "device"] = figures = dict[str, Any](counts)
                if (calibrator := version.calibrators.get(task)) is not None:
                    figures |= {
                        "threshold": round(calibrator.threshold, 4), "drift": round(version.drift[task].index, 4),
                        **{f"expected_{n}": round(v, 4) for n, v in calibrator.expected().items()},
                    }  # fmt: skip
        return {"version": version.number, "seconds": round(self._clock() - self.started), "tasks": tasks}

    def drifting(self) -> list[str]:
        """Tasks whose confidences are distributed otherwise than in calibration."""
        return [task for task, drift in self._version.drift.items() if drift.index > STEADY]

    def check_cloud(self) -> Iterator[Finding]:
        """Check the key and the cloud, without sending a record, until edge.toml changes."""
        now, version = self.live.follow(), self._version
        tasks = {task: version.model.tasks[task].outputs for task in version.calibrators}
        return check_cloud(EdgeDevice(self.device.path, now.settings), tasks, now.cloud)

    def report(self) -> None:
        """Report the counts to the cloud, if anything may be sent. Raises CloudError."""
        now = self.live.follow()
        if now.cloud is not None:
            now.cloud.tell(now.settings.name, self.statistics())


def _whole(task: Task, record: Record) -> dict[str, Any]:
    """The record with each picture's file read once, so that it cannot change meanwhile. Raises DataError."""
    found = dict(record)
    for name, slot in task.slots.items():
        value = found.get(name)
        if slot.type == "image" and value is not None and not isinstance(value, Mapping):
            try:
                found[name] = as_file(value if isinstance(value, (bytes, str, Path)) else open_image(value))
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
    return found


def _value(task: Task, record: Record, outputs: Mapping[str, Any], processor: Processor) -> Any:
    """A task's value in the form of the edge model's. Raises CloudError for outputs of another task of that name, and
    for a value that could not be learned."""
    values = {name: outputs[name] for name in task.outputs if name in outputs}
    for name in task.outputs:
        known, value = labels_of(task, record, name), values.get(name)
        if is_empty(value):
            raise CloudError("empty")
        if value is None or (known and str(value) not in known):
            raise CloudError("unexpected")
        try:
            written = TYPES[task.slots[name].type].target(value, processor)
        except (DataError, UsageError):
            raise CloudError("unexpected") from None
        if not written:
            raise CloudError("empty")
    return values if len(values) > 1 else next(iter(values.values()))

"""Checks of an edge device before it goes live (`openm6-edge check`). They change nothing on it, and send no record."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from openm6._version import __version__
from openm6.core.errors import OpenM6Error
from openm6.edge.box import EYES, Box
from openm6.edge.cloud import CHOSEN, Cloud, CloudError
from openm6.edge.kept import STORE, InterruptedWriteError, open_answer_store
from openm6.edge.opening import check_set_aside, store_summary
from openm6.edge.runner import EdgeModel, Eyes
from openm6.edge.settings import FEATURES, NOTHING
from openm6.edge.sureness import ConfidenceCalibrator, calibrations

CLOCK_MINUTES = 5
"""Tolerated difference between the clocks of device and cloud."""
TRIED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: its subject, whether the device in use would fail there, and a sentence."""

    subject: str
    fails: bool
    message: str

    def line(self) -> str:
        return f"{'FAILS' if self.fails else 'ok':5}  {self.subject:8}  {self.message}"


def check_box(path: Path) -> Iterator[Finding]:
    """All checks of an edge device, in the order of a start."""
    try:
        box = Box(path)
        folder = box.folder() / "package"
        model = EdgeModel(folder, 1)
        calibrated = calibrations(folder)
        for file in calibrated.values():
            ConfidenceCalibrator.load(file, model.about["sha256"])
    except OpenM6Error as error:
        yield Finding("package", True, str(error))
        return
    yield Finding(
        "package",
        False,
        f"version {box.version}, format {model.about['format']}, made by OpenM6 {model.about['version']} (the "
        f"program is {__version__}); it answers "
        f"{', '.join(model.tasks)}; calibrated: {', '.join(calibrated) or 'none, so that nothing is deferred'}.",
    )
    yield _store(box)
    yield _disk(box)
    tasks, settings = {name: model.tasks[name].outputs for name in calibrated if name in model.tasks}, box.settings
    cloud = Cloud(settings.cloud, settings.cloud_key, settings.model) if settings.asks_cloud else None
    with closing(cloud) if cloud else nullcontext():
        yield from check_cloud(box, tasks, cloud)


def check_cloud(box: Box, tasks: dict[str, tuple[str, ...]], cloud: Cloud | None) -> Iterator[Finding]:
    """The checks of the cloud. `tasks`: the outputs of the tasks that may be deferred, by name; `cloud`: None where
    nothing may be sent."""
    settings = box.settings
    if cloud is None:
        why = (
            "none is named" if not settings.cloud else "offline" if settings.offline
            else "privacy = nothing" if settings.privacy == NOTHING else "box.toml cannot be used"
        )  # fmt: skip
        yield Finding("cloud", False, f"it is not asked ({why}).")
        yield _clock(box, "")
        return
    key = settings.cloud_key
    if settings.key:
        yield Finding("key", not key, f"${settings.key} is {'set' if key else 'not set: it has to hold the key'}.")
    began = time.perf_counter()
    try:
        models, date = cloud.read("/v1/models", settings.deadline_ms / 1000)
    except CloudError as error:
        yield Finding("cloud", error.concerns != CHOSEN, f"{settings.cloud}: {error}.")
        yield _clock(box, "")
        return
    taken = 1000 * (time.perf_counter() - began)
    yield Finding("cloud", False, f"{settings.cloud} accepts the key and answers in {taken:.0f} ms.")
    yield _model(box, cloud, models, tasks)
    yield _clock(box, date)


def _store(box: Box) -> Finding:
    """Check the answer store, and count what a start would change in it."""
    try:
        check_set_aside(box.path, box.settings)
        with closing(open_answer_store(box.path, box.settings, read_only=True)) as kept:
            forbidden, plain = kept.pending()
            told = store_summary(box.path, kept)
    except InterruptedWriteError as error:
        return Finding("store", False, str(error))
    except OpenM6Error as error:
        return Finding("store", True, str(error))
    message = f"{sum(told['answers'].values())} stored answers, {told['bytes'] / 2**20:.1f} MB"
    if forbidden:
        message += f"; a start deletes {forbidden}, which privacy = {box.settings.privacy} forbids"
    if plain:
        message += f"; a start encrypts {plain} in place"
    if told["set_aside"]:
        message += f"; damaged and set aside: {', '.join(told['set_aside'])}"
    return Finding("store", False, message + ".")


def _disk(box: Box) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=box.path) as file:
            file.write(bytes(TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(box.path).free / 2**20
    except OSError as error:
        return Finding("disk", True, f"{box.path} cannot be written ({(error.strerror or str(error)).lower()}).")
    store = box.path / STORE
    taken = store.stat().st_size / 2**20 if store.is_file() else 0
    needed = max(0, box.settings.keep_mb - taken)
    return Finding("disk", free < needed, f"{free:,.0f} MB are free; the stored answers may take {needed:,.0f} more.")


def _model(box: Box, cloud: Cloud, models: Any, tasks: dict[str, tuple[str, ...]]) -> Finding:
    """Check that the cloud's model knows the tasks, and has the image encoder of the device's features."""
    settings = box.settings
    try:
        found = {str(one["id"]): one for one in models["data"]}
        name = settings.model or next(iter(found), "")
        if name not in found:
            return Finding("model", True, f"the cloud has no model {name!r}; it has: {', '.join(found) or 'none'}.")
        if settings.privacy == FEATURES and Eyes(box.path / EYES, 1).name != found[name].get("eyes"):
            return Finding("model", True, f"{name} has another image encoder than the features that this device sends.")
        query = f"?{urlencode({'model': name})}" if settings.model else ""
        for task, outputs in tasks.items():
            about, _ = cloud.read(f"/v1/tasks/{quote(task, safe='')}{query}", settings.deadline_ms / 1000)
            if sorted(about["outputs"]) != sorted(outputs):
                return Finding("model", True, f"the task {task} of {name} gives other outputs than the box's.")
    except CloudError as error:
        return Finding("model", error.concerns != CHOSEN, f"{task}: {error}.")
    except OpenM6Error as error:
        return Finding("model", True, str(error))
    except (KeyError, TypeError):
        return Finding("model", True, "the cloud's list of models is not of the expected form: is it `openm6 serve`?")
    return Finding("model", False, f"{name} at the cloud knows {', '.join(tasks) or 'no task that is asked'}.")


def _clock(box: Box, date: str) -> Finding:
    """Compare the clock with the cloud's, or without it with the time at which the device was made."""
    now = time.time()
    try:
        ahead = (now - parsedate_to_datetime(date).timestamp()) / 60
    except (TypeError, ValueError):
        made = (box.folder() / "package" / "edge.json").stat().st_mtime
        told = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
        early = now < made - 60 * CLOCK_MINUTES
        return Finding("clock", early, f"{told}{', which is before the box was made' if early else ''}.")
    off = abs(ahead) > CLOCK_MINUTES
    return Finding("clock", off, f"it differs by {abs(ahead):.1f} minutes from the cloud's.")

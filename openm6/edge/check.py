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
from openm6.edge.answer_store import STORE, InterruptedWriteError
from openm6.edge.calibration import ConfidenceCalibrator, calibrations
from openm6.edge.cloud import CHOSEN, Cloud, CloudError
from openm6.edge.device import EYES, FEATURES, NOTHING, EdgeDevice
from openm6.edge.opening import check_set_aside, open_answer_store, store_summary
from openm6.edge.runner import EdgeModel, ImageEncoder

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


def check_device(path: Path) -> Iterator[Finding]:
    """All checks of an edge device, in the order of a start."""
    try:
        device = EdgeDevice(path)
        folder = device.folder() / "package"
        model = EdgeModel(folder, 1)
        calibrated = calibrations(folder)
        for file in calibrated.values():
            ConfidenceCalibrator.load(file, model.about["sha256"])
    except OpenM6Error as error:
        yield Finding("package", True, str(error))
        return
    message = (
        f"version {device.version}, format {model.about['format']}, made by OpenM6 {model.about['version']} (the "
        f"program is {__version__}); it answers "
        f"{', '.join(model.tasks)}; calibrated: {', '.join(calibrated) or 'none, so that nothing is deferred'}."
    )
    yield Finding("package", False, message)
    yield _store(device)
    yield _disk(device)
    tasks, settings = {name: model.tasks[name].outputs for name in calibrated if name in model.tasks}, device.settings
    cloud = Cloud(settings.cloud, settings.cloud_key, settings.model) if settings.asks_cloud else None
    with closing(cloud) if cloud else nullcontext():
        yield from check_cloud(device, tasks, cloud)


def check_cloud(device: EdgeDevice, tasks: dict[str, tuple[str, ...]], cloud: Cloud | None) -> Iterator[Finding]:
    """The checks of the cloud. `tasks`: the outputs of the tasks that may be deferred, by name; `cloud`: None where
    nothing may be sent."""
    settings, date = device.settings, ""
    if cloud is None:
        why = (
            "none is named" if not settings.cloud else "offline" if settings.offline
            else "privacy = nothing" if settings.privacy == NOTHING else "edge.toml cannot be used"
        )  # fmt: skip
        yield Finding("cloud", False, f"it is not asked ({why}).")
    else:
        if settings.key:
            is_set = bool(settings.cloud_key)
            yield Finding(
                "key", not is_set, f"${settings.key} is {'set' if is_set else 'not set: it has to hold the key'}."
            )
        began = time.perf_counter()
        try:
            models, date = cloud.read("/v1/models", settings.deadline_ms / 1000)
        except CloudError as error:
            yield Finding("cloud", error.concerns != CHOSEN, f"{settings.cloud}: {error}.")
        else:
            taken = 1000 * (time.perf_counter() - began)
            yield Finding("cloud", False, f"{settings.cloud} accepts the key and answers in {taken:.0f} ms.")
            yield _model(device, cloud, models, tasks)
    yield _clock(device, date)


def _store(device: EdgeDevice) -> Finding:
    """Check the answer store, and count what a start would change in it."""
    try:
        check_set_aside(device.path, device.settings)
        with closing(open_answer_store(device.path, device.settings, read_only=True)) as kept:
            forbidden, plain = kept.pending()
            summary = store_summary(device.path, kept)
    except InterruptedWriteError as error:
        return Finding("store", False, str(error))
    except OpenM6Error as error:
        return Finding("store", True, str(error))
    message = f"{sum(summary['answers'].values())} stored answers, {summary['bytes'] / 2**20:.1f} MB"
    if forbidden:
        message += f"; a start deletes {forbidden}, which privacy = {device.settings.privacy} forbids"
    if plain:
        message += f"; a start encrypts {plain} in place"
    if summary["set_aside"]:
        message += f"; damaged and set aside: {', '.join(summary['set_aside'])}"
    return Finding("store", False, message + ".")


def _disk(device: EdgeDevice) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=device.path) as file:
            file.write(bytes(TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(device.path).free / 2**20
    except OSError as error:
        return Finding("disk", True, f"{device.path} cannot be written ({(error.strerror or str(error)).lower()}).")
    store = device.path / STORE
    taken = store.stat().st_size / 2**20 if store.is_file() else 0
    needed = max(0, device.settings.keep_mb - taken)
    return Finding("disk", free < needed, f"{free:,.0f} MB are free; the stored answers may take {needed:,.0f} more.")


def _model(device: EdgeDevice, cloud: Cloud, models: Any, tasks: dict[str, tuple[str, ...]]) -> Finding:
    """Check that the cloud's model knows the tasks, and has the image encoder of the device's features."""
    settings = device.settings
    try:
        found = {str(one["id"]): one for one in models["data"]}
        name = settings.model or next(iter(found), "")
        if name not in found:
            return Finding("model", True, f"the cloud has no model {name!r}; it has: {', '.join(found) or 'none'}.")
        if settings.privacy == FEATURES and ImageEncoder(device.path / EYES, 1).name != found[name].get("eyes"):
            return Finding("model", True, f"{name} has another image encoder than the features that this device sends.")
        query = f"?{urlencode({'model': name})}" if settings.model else ""
        for task, outputs in tasks.items():
            about, _ = cloud.read(f"/v1/tasks/{quote(task, safe='')}{query}", settings.deadline_ms / 1000)
            if sorted(about["outputs"]) != sorted(outputs):
                return Finding("model", True, f"the task {task} of {name} gives other outputs than the device's.")
    except CloudError as error:
        return Finding("model", error.concerns != CHOSEN, f"{task}: {error}.")
    except OpenM6Error as error:
        return Finding("model", True, str(error))
    except (KeyError, TypeError):
        return Finding("model", True, "the cloud's list of models is not of the expected form: is it `openm6 serve`?")
    return Finding("model", False, f"{name} at the cloud knows {', '.join(tasks) or 'no task that is asked'}.")


def _clock(device: EdgeDevice, date: str) -> Finding:
    """Compare the clock with the cloud's, or without it with the time at which the device was made."""
    now = time.time()
    try:
        ahead = (now - parsedate_to_datetime(date).timestamp()) / 60
    except (TypeError, ValueError):
        made = (device.folder() / "package" / "edge.json").stat().st_mtime
        told = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
        early = now < made - 60 * CLOCK_MINUTES
        return Finding("clock", early, f"{told}{', which is before the device was made' if early else ''}.")
    off = abs(ahead) > CLOCK_MINUTES
    return Finding("clock", off, f"it differs by {abs(ahead):.1f} minutes from the cloud's.")

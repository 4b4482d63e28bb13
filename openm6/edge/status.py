"""Status of an edge device, and checks before it goes live. Neither changes anything on it, and no record is sent.

A process that serves an edge device holds a lock on its folder, which ends with the process in any case, and writes its
settings into serving.json.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from openm6._version import __version__
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import write_json
from openm6.edge.answer_store import STORE, InterruptedWriteError
from openm6.edge.calibration import ConfidenceCalibrator, calibrations
from openm6.edge.cloud import CHOSEN, Cloud, CloudError
from openm6.edge.device import FEATURES, FILE, IMAGE_ENCODER, NOTHING, EdgeDevice, Settings
from openm6.edge.opening import check_set_aside, open_answer_store, store_summary

SERVING = "serving.json"
CLOCK_MINUTES = 5
"""Tolerated difference between the clocks of device and cloud."""
TRIED_BYTES = 2**20


class ServiceLock:
    """The lock of the one process that serves an edge device."""

    def __init__(self, path: Path):
        """Raises UsageError where another process holds it."""
        self._path = path
        self._handle = os.open(path, os.O_RDONLY)
        for _ in range(20):  # reading the status takes the lock for a moment
            if _locked(self._handle, fcntl.LOCK_EX):
                with suppress(OSError):  # of a process that was killed
                    (path / SERVING).unlink(missing_ok=True)
                return
            time.sleep(0.05)
        os.close(self._handle)
        state = read_state(path) or {}
        where = f"at {state['url']} by the process {state['process']}" if "url" in state else "by another process"
        raise UsageError(f"{path} is served already, {where}: stop that process first.")

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Raises OSError where the folder cannot be written."""
        write_json(self._path / SERVING, state)

    def close(self) -> None:
        os.close(self._handle)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state that the serving process has written; None where no process serves the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if _locked(handle, fcntl.LOCK_SH):
            return None
    finally:
        os.close(handle)
    try:
        found: dict[str, Any] = json.loads((path / SERVING).read_text("utf-8"))
    except (OSError, ValueError):  # it begins, or its disk is full
        return {}
    return found


def status_of(path: Path) -> dict[str, Any]:
    """Versions, calibrated tasks, settings, stored answers, and the serving process. Raises UsageError for a folder
    that is no edge device, OpenM6Error for a damaged one."""
    problem = ""
    try:
        device = EdgeDevice(path)
    except UsageError as error:
        if not (path / FILE).exists():
            raise
        problem, device = str(error), EdgeDevice(path, Settings())
    calibrated = sorted(calibrations(device.folder() / "package"))
    return {
        "version": device.version, "versions": device.versions, "calibrated": calibrated, "kept": store_summary(path),
        "settings": {} if problem else asdict(device.settings), "problem": problem, "serving": read_state(path),
    }  # fmt: skip


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OpenM6Error(f"The edge device's folder cannot be locked ({error.strerror}).") from None
    return True


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
    from openm6.edge.runner import EdgeModel  # slow to import, and `status` needs none of it

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
    from openm6.edge.runner import ImageEncoder

    settings = device.settings
    try:
        found = {str(one["id"]): one for one in models["data"]}
        name = settings.model or next(iter(found), "")
        if name not in found:
            return Finding("model", True, f"the cloud has no model {name!r}; it has: {', '.join(found) or 'none'}.")
        encoder = found[name].get("image_encoder")
        if settings.privacy == FEATURES and ImageEncoder(device.path / IMAGE_ENCODER, 1).name != encoder:
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
        shown = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
        early = now < made - 60 * CLOCK_MINUTES
        return Finding("clock", early, f"{shown}{', which is before the device was made' if early else ''}.")
    off = abs(ahead) > CLOCK_MINUTES
    return Finding("clock", off, f"it differs by {abs(ahead):.1f} minutes from the cloud's.")

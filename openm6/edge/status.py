"""Status of an edge device: versions, stored answers, and the settings of the serving process. Reading changes nothing.

A process that serves an edge device holds a lock on its folder, which ends with the process in any case, and writes its
settings into serving.json.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import write_json
from openm6.edge.calibration import calibrations
from openm6.edge.device import FILE, EdgeDevice, Settings
from openm6.edge.opening import store_summary

SERVING = "serving.json"


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

"""Deployments: models served in the background of this machine.

ROOT/NAME/deployment.json     address, process, model
ROOT/NAME/log.txt             log of the server
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import write_json
from openm6.hub.jobs import begun, end, home
from openm6.hub.manifests import GRACE

STARTING = 180.0
"""Seconds to wait for a server to become ready."""


@dataclass(frozen=True, slots=True)
class Deployment:
    name: str
    url: str
    model: str
    process: int
    begun: float | None
    created: float

    @property
    def lives(self) -> bool:
        return self.begun is not None and begun(self.process) == self.begun


class Deployments:
    """The deployments of a folder, by default beside the jobs."""

    def __init__(self, root: Path | None = None):
        self.root = root or home() / "deployments"

    def start(
        self, name: str, model: Path, host: str = "127.0.0.1", port: int = 0, more: tuple[str, ...] = ()
    ) -> Deployment:
        """Serve a model directory and wait until it answers; `more`: options of `openm6 serve`. Raises UsageError for
        a name in use, OpenM6Error with the last line of the log if the server does not start."""
        if not name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"{name!r} is not a valid name of a deployment: use letters, digits, - and _.")
        there = next((one for one in self.list() if one.name == name), None)
        if there and there.lives:
            raise UsageError(f"{name} is already served at {there.url}: stop it first.")
        port = port or _free(host)
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "openm6", "serve", f"{name}={model}", "--host", host, "--port", str(port),
                    *more,
                ],
                stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        shown = "127.0.0.1" if host == "0.0.0.0" else host
        made = Deployment(
            name, f"http://{shown}:{port}", str(model.resolve()), process.pid, begun(process.pid), time.time()
        )
        _await(made, process, log)
        write_json(folder / "deployment.json", asdict(made))
        return made

    def list(self) -> list[Deployment]:
        """All deployments that were started and not stopped."""
        found = []
        for file in sorted(self.root.glob("*/deployment.json")):
            try:
                found.append(Deployment(**json.loads(file.read_text("utf-8"))))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def stop(self, name: str) -> None:
        """Stop a deployment after its running requests. Raises UsageError for an unknown name."""
        one = next((one for one in self.list() if one.name == name), None)
        if one is None:
            raise UsageError(f"There is no deployment {name}.")
        if one.lives:
            end(one.process, signal.SIGTERM, GRACE)
        (self.root / name / "deployment.json").unlink(missing_ok=True)


def _await(made: Deployment, process: subprocess.Popen[bytes], log: Path) -> None:
    import urllib.error
    import urllib.request

    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{made.url}/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    end(process.pid, signal.SIGTERM, 5.0)
    words = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    raise OpenM6Error(f"The server did not start: {words[-1] if words else 'its log is empty'} ({log})")


def _free(host: str) -> int:
    with socket.socket() as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])

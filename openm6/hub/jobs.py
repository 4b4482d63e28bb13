"""The job queue: `openm6` commands that run in the background and can be stopped and resumed.

    ROOT/ID/job.json     command and state, written atomically
    ROOT/ID/log.txt      output

A worker (`Jobs.work`) starts queued jobs, each in its own process and session (`run_job.py`), so that they outlive the
worker. Any number of workers may share a ROOT. The commands allowed here resume an interrupted run; a job whose process
died is therefore queued again, up to ATTEMPTS times.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from openm6.core.environment import HOME
from openm6.core.errors import ErrorKind, OpenM6Error, UsageError, cut, suggest
from openm6.core.files import whole_lines, write_json

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
HERE, RAY = "here", "ray"
ENGINES = (HERE, RAY)
"""Execution backends: a process of this machine, or a Ray cluster."""
OVER = (DONE, FAILED, STOPPED)
ATTEMPTS = 3
"""Number of times that a job is started while its process dies."""
COMMANDS = (
    "train", "finetune", "eval", "images", "copy", "index", "recommend", "reproduce", "bench", "demo", "demo-images",
    "cascade", "compress",
)  # fmt: skip
"""Commands that can be jobs."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command and its state. Times are seconds since 1970; `begun`: start time of the process with the id `process`
    (process ids are reused)."""

    id: str
    words: tuple[str, ...]
    folder: str
    state: str = WAITING
    name: str = ""
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    process: int | None = None
    begun: float | None = None
    code: int | None = None
    attempts: int = 0
    message: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    engine: str = HERE
    gpus: int = 0


def home() -> Path:
    """The data folder of the platform on this machine: `$OPENM6_HOME`, else ~/.local/share/openm6."""
    return Path(os.environ.get(HOME) or Path.home() / ".local" / "share" / "openm6")


class Jobs:
    """The jobs of a folder."""

    def __init__(self, root: Path | None = None):
        self.root = root or home() / "jobs"

    # Submitting and querying

    def submit(
        self, words: Sequence[str], name: str = "", folder: Path | None = None, engine: str = HERE, gpus: int = 0
    ) -> Job:
        """Queue a command. Raises UsageError for a command that cannot be a job."""
        if engine not in ENGINES:
            raise UsageError(f"The engine of a job is {' or '.join(ENGINES)}, not {engine}.")
        if not words or words[0] not in COMMANDS:
            given = words[0] if words else ""
            raise UsageError(
                f"{given!r} is not a command that can be a job.{suggest(given, list(COMMANDS))} "
                f"Known: {', '.join(COMMANDS)}."
            )
        kept = {k: v for k, v in os.environ.items() if k.startswith("OPENM6_") or k in ("OMP_NUM_THREADS",)}
        created = time.time()
        job = Job(
            f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(created))}-{secrets.token_hex(2)}", tuple(words),
            str((folder or Path.cwd()).resolve()), name=name or " ".join(words[:2]), created=created, environment=kept,
            engine=engine, gpus=gpus,
        )  # fmt: skip
        with self._locked():
            (self.root / job.id).mkdir(parents=True)
            self._write(job)
        return job

    def list(self) -> list[Job]:
        """All jobs, oldest first."""
        found = (self._read(path) for path in self.root.glob("*/job.json"))
        return sorted((job for job in found if job is not None), key=lambda job: (job.created, job.id))

    def get(self, identity: str) -> Job:
        """The job with this id or unique prefix. Raises UsageError (NOT_FOUND) for none or several."""
        found = [job for job in self.list() if identity and job.id.startswith(identity)]
        if len(found) != 1:
            reason = f"{identity} is a prefix of {len(found)} jobs." if found else f"There is no job {cut(identity)}."
            message = reason + " `openm6 jobs list` shows all jobs."
            raise UsageError(message, kind=ErrorKind.NOT_FOUND)
        return found[0]

    def log(self, job: Job) -> Path:
        return self.root / job.id / "log.txt"

    def last_said(self, job: Job, most: int) -> str:
        """The tail of a job's log, at most `most` bytes, from the start of a line."""
        return _tail(self.log(job), most).decode("utf-8", "replace")

    def stop(self, identity: str) -> Job:
        """Stop a job by SIGTERM, then SIGKILL; it can be resumed. Raises UsageError for a finished one."""
        with self._locked():
            job = self.get(identity)
            if job.state in OVER:
                raise UsageError(f"The job {job.id} is already {job.state}.")
            process = job.process if job.state == RUNNING and self._lives(job) else None
            job = replace(job, state=STOPPED, ended=time.time())
            self._write(job)
        if process is not None:
            end(process)
        return job

    def resume(self, identity: str) -> Job:
        """Queue a stopped or failed job again. Raises UsageError for any other."""
        with self._locked():
            job = self.get(identity)
            if job.state not in (STOPPED, FAILED):
                raise UsageError(f"The job {job.id} is {job.state}: only stopped and failed jobs can be resumed.")
            job = replace(job, state=WAITING, ended=None, code=None, attempts=0, message="", process=None)
            self._write(job)
        return job

    def remove(self, identity: str) -> None:
        """Remove a finished job and its log; its output stays. Raises UsageError for one that is not over."""
        import shutil

        with self._locked():
            job = self.get(identity)
            if job.state not in OVER:
                raise UsageError(f"The job {job.id} is {job.state}: stop it first.")
            shutil.rmtree(self.root / job.id)

    # Running

    def work(self, at_once: int = 1, until_empty: bool = False, seconds: float = 0.5) -> None:
        """Run queued jobs, `at_once` in parallel, for ever or until the queue is empty; poll every `seconds`."""
        while True:
            self.step(at_once)
            if until_empty and all(job.state in OVER for job in self.list()):
                return
            time.sleep(seconds)

    def step(self, at_once: int = 1) -> None:
        """One poll of a worker: requeue jobs whose process died, and start queued ones."""
        with self._locked():
            for job in self.list():
                if job.state == RUNNING and not self._lives(job):
                    self._write(_died(job))
            jobs = self.list()
            room = at_once - sum(job.state == RUNNING for job in jobs)
            for job in [job for job in jobs if job.state == WAITING][: max(0, room)]:
                self._start(job)

    def _start(self, job: Job) -> None:
        if not Path(job.folder).is_dir():
            message = f"The folder {job.folder} no longer exists."
            self._write(replace(job, state=FAILED, ended=time.time(), message=message))
            return
        with self.log(job).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "openm6.hub.run_job", str(self.root / job.id)], cwd=job.folder, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **job.environment},
            )  # fmt: skip
        now = time.time()
        self._write(
            replace(job, state=RUNNING, started=job.started or now, process=process.pid, begun=begun(process.pid))
        )

    def finished(self, identity: str, code: int) -> None:
        """Record the exit code of a job; called by its own process."""
        with self._locked():
            job = self.get(identity)
            if job.state != RUNNING:  # it was stopped
                return
            state = DONE if code == 0 else FAILED
            said = [line.strip() for line in self.last_said(job, 4000).splitlines() if line.strip()] if code else []
            message = said[-1][:500] if said else ""
            self._write(replace(job, state=state, ended=time.time(), code=code, message=message))

    def _lives(self, job: Job) -> bool:
        return job.process is not None and begun(job.process) == job.begun and job.begun is not None

    # Files

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OpenM6Error(f"{self.root} cannot be made ({error.strerror}): set {HOME} to another folder.") from None
        with FileLock(str(self.root / "lock")):
            yield

    def _write(self, job: Job) -> None:
        file = self.root / job.id / "job.json"
        try:
            write_json(file, asdict(job))
        except OSError as error:
            raise OpenM6Error(f"{file} cannot be written ({error.strerror}).") from None

    def _read(self, path: Path) -> Job | None:
        try:
            values = json.loads(path.read_text("utf-8"))
            return Job(**{**values, "words": tuple(values["words"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None  # being removed, or another file


def _died(job: Job) -> Job:
    """The state of a job whose process or machine was killed."""
    if job.attempts + 1 < ATTEMPTS:
        return replace(job, state=WAITING, attempts=job.attempts + 1, process=None, begun=None)
    message = f"Its process died {ATTEMPTS} times."
    return replace(job, state=FAILED, attempts=job.attempts + 1, ended=time.time(), message=message)


def end(process: int, gently: int = signal.SIGTERM, seconds: float = 20.0) -> None:
    """End the session of a process by the signal `gently`, after `seconds` by SIGKILL."""
    since = begun(process)
    for number in (gently, signal.SIGKILL):
        try:
            os.killpg(process, number)
        except (ProcessLookupError, PermissionError):
            return
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if begun(process) != since:
                return
            time.sleep(0.05)


def begun(process: int) -> float | None:
    """Start time of a process; None if it does not exist or is a zombie."""
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else round(found.create_time(), 2)
    except psutil.Error:
        return None


def progress(job: Job) -> dict[str, Any]:
    """{"step", "steps", "loss", "seconds_left"} of a training job; {} for others and before the first step."""
    output = output_of(job)
    if output is None:
        return {}
    last, total = last_step(output), _steps(output)
    if not last or not total:
        return {}
    left = (total - last["step"]) * last.get("seconds_per_step", 0.0)
    return {"step": last["step"], "steps": total, "loss": last["loss"], "seconds_left": round(left)}


def describe_job(job: Job) -> dict[str, Any]:
    """A job as JSON, for the command line and the HTTP API."""
    seconds = (job.ended or time.time()) - job.started if job.started else None
    return {
        "id": job.id, "name": job.name, "state": job.state, "command": " ".join(job.words), "folder": job.folder,
        "engine": job.engine, "seconds": None if seconds is None else round(seconds), "code": job.code,
        "message": job.message, "attempts": job.attempts, "progress": progress(job) if job.state == RUNNING else {},
    }  # fmt: skip


def last_step(output: Path) -> dict[str, Any]:
    """The log record of a training's last step; {} if there is none."""
    whole = _tail(output / "metrics.jsonl", 100_000).split(b"\n")[:-1]  # the last line may be incomplete
    try:
        lines = [json.loads(line) for line in whole[-50:]]
    except ValueError:
        return {}
    return next((line for line in reversed(lines) if "loss" in line), {})


def curve(job: Job) -> list[tuple[int, float]]:
    """(step, loss) of a training job from its log. Raises DataError for a damaged one."""
    output = output_of(job)
    records = whole_lines(output / "metrics.jsonl") if output else ()
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def output_of(job: Job) -> Path | None:
    """The run folder of a training job, from its command or its recipe; None for other jobs."""
    import yaml

    words, option = job.words, {"finetune": "--output", "train": "output"}.get(job.words[0])
    given = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    given += [value for word, value in pairwise(words) if word == option == "--output"]
    if given:
        return Path(job.folder) / given[0]
    if option != "output" or len(words) < 2:
        return None
    try:
        content = yaml.safe_load((Path(job.folder) / words[1]).read_text("utf-8"))
        return Path(job.folder) / str(content.get("output") or f"runs/{content.get('name') or Path(words[1]).stem}")
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _tail(path: Path, most: int) -> bytes:
    """At most the last `most` bytes of a file, from the start of a line; none if it is missing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            text = file.read()
    except OSError:
        return b""
    return text if size <= most else text.partition(b"\n")[2]


def _steps(output: Path) -> int:
    import yaml

    try:
        return int(yaml.safe_load((output / "recipe.yaml").read_text("utf-8"))["train"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0

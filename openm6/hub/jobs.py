"""Jobs: commands of `openm6` that run one after the other, outlive whoever started them, and can be stopped and gone on
with.

    ROOT/ID/job.json     what it is and how far it is; written whole
    ROOT/ID/log.txt      what it has said

A queue (`Jobs.work`) starts what waits, each in a process and session of its own (`run_job.py`), so that it goes on
when the queue ends. Any number of queues may work at one ROOT. Every command that is meant here goes on where it was
when it is given again; so a job whose process died waits for its turn again, a few times.
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
from pathlib import Path
from typing import Any

from openm6.core.environment import HOME
from openm6.core.errors import OpenM6Error, UsageError, cut, suggest
from openm6.core.files import write_json

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
HERE, RAY = "here", "ray"
ENGINES = (HERE, RAY)
"""Where a job runs: in a process of this machine, or on a Ray cluster."""
OVER = (DONE, FAILED, STOPPED)
ATTEMPTS = 3
"""Times that a job is started again after its process died."""
COMMANDS = (
    "train", "finetune", "eval", "images", "copy", "index", "recommend", "reproduce", "bench", "demo", "demo-images",
    "cascade", "compress",
)  # fmt: skip
"""What a job may be."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command and its state. Times are seconds since 1970; `process` is of the one that runs it, with the time when
    that began (numbers of processes come again)."""

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
    """Where a team's things are kept here: `$OPENM6_HOME`, else ~/.local/share/openm6."""
    return Path(os.environ.get(HOME) or Path.home() / ".local" / "share" / "openm6")


class Jobs:
    """The jobs of a folder."""

    def __init__(self, root: Path | None = None):
        self.root = root or home() / "jobs"

    # Asking

    def submit(
        self, words: Sequence[str], name: str = "", folder: Path | None = None, engine: str = HERE, gpus: int = 0
    ) -> Job:
        """A command waits for its turn. Raises UsageError for what is no job."""
        if engine not in ENGINES:
            raise UsageError(f"A job runs {' or '.join(ENGINES)}, not {engine}.")
        if not words or words[0] not in COMMANDS:
            given = words[0] if words else ""
            raise UsageError(
                f"A job is a command of openm6, not {given!r}.{suggest(given, list(COMMANDS))} "
                f"There are: {', '.join(COMMANDS)}."
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
        """All, the oldest first."""
        found = (self._read(path) for path in self.root.glob("*/job.json"))
        return sorted((job for job in found if job is not None), key=lambda job: (job.created, job.id))

    def get(self, identity: str) -> Job:
        """One, by its id or the beginning of it. Raises UsageError where there is none, or several."""
        if not identity or not all(c.isalnum() or c == "-" for c in identity):
            raise UsageError(f"There is no job {cut(identity)}.")
        found = [job for job in self.list() if job.id.startswith(identity)]
        if len(found) != 1:
            told = f"{identity} begins the ids of {len(found)} jobs." if found else f"There is no job {cut(identity)}."
            raise UsageError(told + " `openm6 jobs list` shows them.")
        return found[0]

    def log(self, job: Job) -> Path:
        return self.root / job.id / "log.txt"

    def last_said(self, job: Job, most: int) -> str:
        """The end of its log, of so many bytes at most, from the beginning of a line."""
        try:
            with self.log(job).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - most))
                text = file.read()
        except OSError:
            return ""
        return (text if size <= most else text.partition(b"\n")[2]).decode("utf-8", "replace")

    def stop(self, identity: str) -> Job:
        """End a job, gently; it can be gone on with. Raises UsageError for one that is over."""
        with self._locked():
            job = self.get(identity)
            if job.state in OVER:
                raise UsageError(f"The job {job.id} is {job.state} already.")
            process = job.process if job.state == RUNNING and self._lives(job) else None
            job = replace(job, state=STOPPED, ended=time.time())
            self._write(job)
        if process is not None:
            end(process)
        return job

    def resume(self, identity: str) -> Job:
        """Let a job that was stopped or failed wait for its turn again. Raises UsageError for any other."""
        with self._locked():
            job = self.get(identity)
            if job.state not in (STOPPED, FAILED):
                raise UsageError(f"The job {job.id} is {job.state}: only what was stopped or failed is gone on with.")
            job = replace(job, state=WAITING, ended=None, code=None, attempts=0, message="", process=None)
            self._write(job)
        return job

    def remove(self, identity: str) -> None:
        """Forget a job that is over, and its log; what it has made stays."""
        import shutil

        with self._locked():
            job = self.get(identity)
            if job.state not in OVER:
                raise UsageError(f"The job {job.id} is {job.state}: stop it first.")
            shutil.rmtree(self.root / job.id)

    # Working

    def work(self, at_once: int = 1, until_empty: bool = False, seconds: float = 0.5) -> None:
        """Start what waits, so many at the same time, until nothing is left or for ever."""
        while True:
            self.step(at_once)
            if until_empty and all(job.state in OVER for job in self.list()):
                return
            time.sleep(seconds)

    def step(self, at_once: int = 1) -> None:
        """Look after what runs, and start what there is room for."""
        with self._locked():
            jobs = self.list()
            for job in jobs:
                if job.state == RUNNING and not self._lives(job):
                    self._write(_died(job))
            jobs = self.list()
            room = at_once - sum(job.state == RUNNING for job in jobs)
            for job in [job for job in jobs if job.state == WAITING][: max(0, room)]:
                self._start(job)

    def _start(self, job: Job) -> None:
        if not Path(job.folder).is_dir():
            message = f"The folder {job.folder} is not there any more."
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
        """A job's own process says how it ended."""
        with self._locked():
            job = self.get(identity)
            if job.state != RUNNING:  # it was stopped
                return
            state = DONE if code == 0 else FAILED
            message = "" if code == 0 else self._last_words(job)
            self._write(replace(job, state=state, ended=time.time(), code=code, message=message))

    def _last_words(self, job: Job) -> str:
        lines = self.last_said(job, 4000).splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]

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
            return None  # it is being removed, or is none of ours


def _died(job: Job) -> Job:
    """Its process is gone and has not said how it ended: it was killed, or the machine was."""
    if job.attempts + 1 < ATTEMPTS:
        return replace(job, state=WAITING, attempts=job.attempts + 1, process=None, begun=None)
    message = f"Its process died {ATTEMPTS} times."
    return replace(job, state=FAILED, attempts=job.attempts + 1, ended=time.time(), message=message)


def end(process: int, gently: int = signal.SIGTERM, seconds: float = 20.0) -> None:
    """The whole session of a process, gently, then not."""
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
    """When a process began; None of one that is not there or only waits to be buried."""
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else round(found.create_time(), 2)
    except psutil.Error:
        return None


def progress(job: Job) -> dict[str, Any]:
    """Of a job that trains: step, steps, loss, seconds left, as its run tells; {} of others and before it begins."""
    output = output_of(job)
    if output is None:
        return {}
    last, total = last_step(output), _steps(output)
    if not last or not total:
        return {}
    left = (total - last["step"]) * last.get("seconds_per_step", 0.0)
    return {"step": last["step"], "steps": total, "loss": last["loss"], "seconds_left": round(left)}


def told(job: Job) -> dict[str, Any]:
    """What is said of a job, by the command line and by HTTP."""
    seconds = (job.ended or time.time()) - job.started if job.started else None
    return {
        "id": job.id, "name": job.name, "state": job.state, "command": " ".join(job.words), "folder": job.folder,
        "engine": job.engine, "seconds": None if seconds is None else round(seconds), "code": job.code,
        "message": job.message, "attempts": job.attempts, "progress": progress(job) if job.state == RUNNING else {},
    }  # fmt: skip


def last_step(output: Path) -> dict[str, Any]:
    """What the log of a training in this folder says of its last step; {} where there is none."""
    try:
        with (output / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 100_000))
            whole = file.read().split(b"\n")[:-1]  # the last line may be half written
            lines = [json.loads(line) for line in whole[-50:] if line.startswith(b"{")]
    except (OSError, ValueError):
        return {}
    return next((line for line in reversed(lines) if "loss" in line), {})


def curve(job: Job) -> list[tuple[int, float]]:
    """Of a job that trains: (step, loss) as its run has logged them; a log that is being written may end mid-line."""
    output = output_of(job)
    try:
        lines = (output / "metrics.jsonl").read_bytes().splitlines() if output else []
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            told = json.loads(line)
            found.append((int(told["step"]), float(told["loss"])))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def output_of(job: Job) -> Path | None:
    """The folder of a job's run: what it says itself, else what its recipe says; None of one that does not train."""
    import yaml

    words = list(job.words)
    if words[0] == "finetune":
        for number, word in enumerate(words):
            if word == "--output" and number + 1 < len(words):
                return Path(job.folder) / words[number + 1]
            if word.startswith("--output="):
                return Path(job.folder) / word.partition("=")[2]
        return None
    if words[0] != "train" or len(words) < 2:
        return None
    for word in words[2:]:
        if word.startswith("output="):
            return Path(job.folder) / word.partition("=")[2]
    try:
        content = yaml.safe_load((Path(job.folder) / words[1]).read_text("utf-8"))
        return Path(job.folder) / str(content.get("output") or f"runs/{content.get('name') or Path(words[1]).stem}")
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _steps(output: Path) -> int:
    import yaml

    try:
        return int(yaml.safe_load((output / "recipe.yaml").read_text("utf-8"))["train"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0

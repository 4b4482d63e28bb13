"""Processes that begin with PyTorch and OpenM6 imported: forked from one server; a new one imports for seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preloaded"])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run_openm6(
    *words: object, folder: Path | None = None, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`openm6 WORDS` in a process of its own: its exit code and what it printed."""
    arguments = list(map(str, words))
    with TemporaryDirectory() as room:
        process = _begin(call_openm6, (arguments,), Path(room), folder, environment)
        _wait([process], timeout)
        printed = [Path(room, name).read_text("utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(["openm6", *arguments], process.exitcode or 0, *printed)


def run_ranks(world: int, function: Callable[..., None], *arguments: Any, timeout: float = 300) -> None:
    """`function(*arguments)` in `world` processes that find one another as torchrun's do; AssertionError where one
    fails."""
    meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with TemporaryDirectory() as room:
        rooms = [Path(room, str(rank)) for rank in range(world)]
        processes = []
        for rank, own in enumerate(rooms):
            own.mkdir()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), **meeting}
            processes.append(_begin(function, arguments, own, None, {**os.environ, **place}))
        _wait(processes, timeout)
        for process, own in zip(processes, rooms, strict=True):
            assert process.exitcode == 0, (own / "stderr").read_text("utf-8")[-3000:]


def _begin(
    function: Callable[..., None],
    arguments: Sequence[Any],
    room: Path,
    folder: Path | None,
    environment: Mapping[str, str] | None,
) -> BaseProcess:
    settings = dict(os.environ if environment is None else environment)
    process = _forks.Process(target=_run, args=(function, arguments, room, folder or Path.cwd(), settings))
    process.start()
    return process


def _wait(processes: list[BaseProcess], timeout: float) -> None:
    for process in processes:
        process.join(timeout)
        if process.exitcode is None:
            for one in processes:
                one.kill()
            raise subprocess.TimeoutExpired(str(process), timeout)


def _run(
    function: Callable[..., None], arguments: Sequence[Any], room: Path, folder: Path, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(room / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (open(one, "w", encoding="utf-8", closefd=False, buffering=1) for one in (1, 2))  # noqa: SIM115
    function(*arguments)


def call_openm6(arguments: list[str]) -> None:
    """The program, in the process that calls it; it ends with SystemExit where the program does."""
    from openm6.cli import main

    sys.argv = ["openm6", *arguments]
    main()

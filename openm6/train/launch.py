"""One command, several processes on this machine: torchrun's variables, without its noise.

Across machines use torchrun itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from openm6.core.errors import OpenM6Error

GRACE = 10.0
"""Seconds that the other processes have to end by themselves after one has failed."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """One a GPU; without one, one a core, four at most."""
    import torch

    return torch.cuda.device_count() or min(4, cores())


def launch(arguments: list[str], processes: int, logs: Path) -> None:
    """Run `openm6 ARGUMENTS` in a group of processes; the first one prints, the others write to `logs`.

    Raises OpenM6Error when a process is killed; exits with its code when one fails by itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores() // processes)), **os.environ,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
    }  # fmt: skip
    logs.mkdir(parents=True, exist_ok=True)
    files = [(logs / f"process-{rank}.log").open("w") for rank in range(1, processes)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "openm6", *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=files[rank - 1] if rank else None,
            stderr=subprocess.STDOUT if rank else None,
        )
        for rank in range(processes)
    ]
    try:
        _wait(running)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for file in files:
            file.close()
    failed = [(rank, p.returncode) for rank, p in enumerate(running) if p.returncode]
    if not failed:
        return
    if running[0].returncode > 0:  # it has said why
        raise SystemExit(running[0].returncode)
    rank, code = next(((r, c) for r, c in failed if c > 0), failed[0])
    raise OpenM6Error(
        f"Process {rank} of {processes} ended with code {code}; see {logs / f'process-{rank}.log'}. "
        "Run the same command again to resume from the last checkpoint."
    )


def _wait(running: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended, or GRACE seconds after the first failure."""
    deadline = float("inf")
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
        if deadline == float("inf") and any(p.poll() for p in running):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)

"""The process of one job, started by a queue worker (jobs.py): `python -m openm6.hub.run_job DIRECTORY`."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

from openm6.core.errors import OpenM6Error
from openm6.core.extras import require
from openm6.core.ray_cluster import connect
from openm6.hub.jobs import RAY, Job, Jobs


def main(directory: Path) -> int:
    jobs = Jobs(directory.parent)
    job = jobs.get(directory.name)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  openm6 {' '.join(job.words)}", flush=True)
    if job.engine == RAY:
        code = _run_on_ray(job)
    else:  # SIGTERM reaches the whole session: the command handles it, and this process waits for its end
        signal.signal(signal.SIGTERM, lambda *_: None)
        code = subprocess.run([sys.executable, "-m", "openm6", *job.words], check=False).returncode
    jobs.finished(job.id, code)
    return code


def _run_on_ray(job: Job) -> int:
    """Run the command on the cluster at $RAY_ADDRESS, or on a local one started here, and return its exit code. The
    folder has to be on a file system shared by all machines. SIGTERM cancels the command on the cluster."""
    require("ray", "ray")
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        connect(os.environ.get("RAY_ADDRESS"), log_to_driver=True)
    except OpenM6Error as error:
        print(error, flush=True)
        return 1
    # One process per job: its memory is freed with it, and it can be killed.
    task = ray.remote(max_calls=1, max_retries=0, num_gpus=job.gpus)(_run)
    running = task.remote(list(job.words), job.folder, job.environment)
    signal.signal(signal.SIGTERM, lambda *_: ray.cancel(running, force=True))
    try:
        return int(ray.get(running))
    except RayError as error:
        print(f"Ray: {str(error).strip().splitlines()[0]}", flush=True)
        return 1
    finally:
        ray.shutdown()


def _run(words: list[str], folder: str, environment: dict[str, str]) -> int:
    """The command, in the worker process."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["openm6", *words]
    try:
        runpy.run_module("openm6", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

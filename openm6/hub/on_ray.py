"""Running a job's command on a Ray cluster; this process is the driver."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from openm6.core.extras import require


def run_on_ray(words: Sequence[str], folder: str, environment: Mapping[str, str], gpus: int = 0) -> int:
    """Run `openm6 WORDS` on the cluster at $RAY_ADDRESS, or on a local one started here, and return its exit code. The
    folder has to be on a file system shared by all machines. SIGTERM cancels the command on the cluster."""
    require("ray", "ray")
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=True)
    # One process per job: its memory is freed with it, and it can be killed.
    task = ray.remote(max_calls=1, max_retries=0, num_gpus=gpus)(_run)
    running = task.remote(list(words), folder, dict(environment))
    signal.signal(signal.SIGTERM, lambda *_: ray.cancel(running, force=True))
    try:
        return int(ray.get(running))
    except RayError as error:
        print(f"Ray: {str(error).strip().splitlines()[0]}", flush=True)
        return 1
    finally:
        ray.shutdown()


def _run(words: list[str], folder: str, environment: dict[str, Any]) -> int:
    """The command, in the worker process."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["openm6", *words]
    try:
        runpy.run_module("openm6", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0

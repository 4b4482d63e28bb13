"""The process of one job, started by a queue worker (jobs.py): `python -m openm6.hub.run_job DIRECTORY`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from openm6.hub.jobs import RAY, Jobs


def main(directory: Path) -> int:
    jobs = Jobs(directory.parent)
    job = jobs.get(directory.name)
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  openm6 {' '.join(job.words)}", flush=True)
    if job.engine == RAY:
        from openm6.hub.on_ray import run_on_ray

        code = run_on_ray(job.words, job.folder, job.environment, job.gpus)
        jobs.finished(job.id, code)
        return code
    # SIGTERM reaches the whole session: the command handles it, and this process waits for its end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    code = subprocess.run([sys.executable, "-m", "openm6", *job.words], check=False, env=os.environ).returncode
    jobs.finished(job.id, code)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Jobs on a Ray cluster of this machine."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openm6.core.environment import HOME
from openm6.core.errors import UsageError
from openm6.hub.jobs import DONE, FAILED, RAY, RUNNING, STOPPED, Jobs, begun
from tests.hub.test_jobs import training, until
from tests.processes import run_openm6
from tests.train.conftest import losses

pytest.importorskip("ray")


CLUSTER = """
import ray, sys
found = ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
print(found.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster that is there already; its token is in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            yield process.stdout.readline().strip()


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return Jobs()


def test_where_a_job_runs_is_checked(jobs: Jobs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is here or ray, not mars"):
        jobs.submit(["eval", "--help"], folder=tmp_path, engine="mars")


@pytest.mark.slow
def test_a_job_runs_on_a_cluster_as_it_does_here(
    jobs: Jobs, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one that it starts, and on one that is there."""
    recipe, output = training(tmp_path, 6)
    good = jobs.submit(["train", recipe], folder=tmp_path, engine=RAY)
    jobs.work(until_empty=True, seconds=0.05)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    bad = jobs.submit(["train", "no-such-recipe.yaml"], folder=tmp_path, engine=RAY)
    jobs.work(until_empty=True, seconds=0.05)
    assert jobs.get(good.id).state == DONE, jobs.last_said(good, 5000)
    found = jobs.get(bad.id)
    assert (found.state, found.code) == (FAILED, 2) and "no-such-recipe" in jobs.last_said(found, 5000)
    there = losses(output)
    recipe, output = training(tmp_path / "here", 6)
    assert run_openm6("train", recipe).returncode == 0
    assert losses(output) == there and len(there) == 6


@pytest.mark.slow
def test_a_job_on_a_cluster_is_stopped_and_gone_on_with(
    jobs: Jobs, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    recipe, output = training(tmp_path, 400)
    job = jobs.submit(["train", recipe], folder=tmp_path, engine=RAY)
    until(lambda: bool(output.is_dir() and list(output.glob("checkpoints/*"))), jobs)
    process = jobs.get(job.id).process
    assert jobs.stop(job.id).state == STOPPED and process is not None
    until(lambda: begun(process) is None)
    seen = (output / "metrics.jsonl").stat().st_size
    time.sleep(1)
    assert (output / "metrics.jsonl").stat().st_size == seen  # nothing of it goes on elsewhere
    jobs.resume(job.id)
    until(lambda: jobs.get(job.id).state == RUNNING and (output / "metrics.jsonl").stat().st_size > seen, jobs)
    jobs.stop(job.id)

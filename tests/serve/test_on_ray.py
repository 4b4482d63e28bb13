"""Two replicas on a Ray of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openm6 import Client
from openm6.inference.session import Session
from tests.processes import free_port

pytest.importorskip("ray.serve")

DEPLOYING = """
import json, os, sys
from pathlib import Path
from ray import serve
from openm6.serve.on_ray import deploy_on_ray
from openm6.serve.server import Options

model, port = Path(sys.argv[1]), int(sys.argv[2])
url = deploy_on_ray("goods", model, Options(), replicas=2, most=2, cpus=0.5, port=port)
states = serve.status().applications["goods"].deployments["goods"].replica_states
print(json.dumps({"url": url, "states": {str(getattr(state, "value", state)): n for state, n in states.items()}}))
sys.stdout.flush()
sys.stdin.read()
serve.shutdown()
"""
"""In a process of its own, as a user's would be: what Ray leaves running in it as it stops can end it."""


@pytest.mark.slow
def test_replicas_answer_like_one_server(session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "model")
    port = free_port()
    with (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", DEPLOYING, str(tmp_path / "model"), str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    with process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if line.startswith("{"))
        told = next(lines, None)
        assert told is not None, (tmp_path / "errors.txt").read_text()
        found = json.loads(told)
        assert found["states"] == {"RUNNING": 2}
        alone = Session.load(tmp_path / "model").run("write", text="红色", decoding={"max_new_tokens": 8})
        with Client(found["url"]) as m6, ThreadPoolExecutor(8) as pool:
            asked = pool.map(lambda _: m6.run("write", text="红色", decoding={"max_new_tokens": 8}), range(24))
            assert set(asked) == {alone}

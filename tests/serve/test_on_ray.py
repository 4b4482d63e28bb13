"""Two replicas on a Ray of this machine."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openm6 import Client
from openm6.bundle import Bundle
from openm6.serve.fleet import Place
from openm6.serve.server import Options

pytest.importorskip("ray.serve")


@pytest.mark.slow
def test_replicas_answer_like_one_server(bundle: Bundle, tmp_path: Path) -> None:
    import ray
    from ray import serve

    from openm6.serve.on_ray import deploy_on_ray

    bundle.save(tmp_path / "model")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    try:
        url = deploy_on_ray(
            "goods", {"goods": Place(tmp_path / "model")}, Options(), replicas=2, most=2, cpus=0.5, port=port
        )
        status = serve.status().applications["goods"].deployments["goods"]
        assert status.replica_states == {"RUNNING": 2}
        alone = Bundle.load(tmp_path / "model").run("write", text="红色", decoding={"max_new_tokens": 8})
        with Client(url) as m6, ThreadPoolExecutor(8) as pool:
            asked = pool.map(lambda _: m6.run("write", text="红色", decoding={"max_new_tokens": 8}), range(24))
            assert set(asked) == {alone}
    finally:
        serve.shutdown()
        ray.shutdown()

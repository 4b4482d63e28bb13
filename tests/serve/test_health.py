"""What a server that stops, or that cannot read its files, tells whoever asks; no process is needed."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient

from openm6.serve.api import create_app
from openm6.serve.fleet import Fleet
from openm6.serve.server import Options


def test_a_server_that_stops_says_so() -> None:
    fleet = Fleet()
    client = TestClient(create_app(fleet), base_url="http://127.0.0.1")
    assert client.get("/readyz").status_code == 503  # no model is there yet
    fleet.closing = True
    assert client.get("/readyz").status_code == 503 and "stopping" in client.get("/readyz").text
    assert client.get("/healthz").status_code == 200
    for path in ("tasks/caption", "tasks/caption/batch", "chat/completions", "embeddings", "images/generations"):
        refused = client.post(f"/v1/{path}", json={})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
        assert int(refused.headers["retry-after"]) >= 1


def test_a_damaged_file_of_keys_tells_no_path(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("[")
    client = TestClient(create_app(Fleet(), Options(keys=tmp_path / "keys.json")))
    told = client.get("/v1/models", headers={"Authorization": "Bearer m6-x"})
    assert told.status_code >= 400 and str(tmp_path) not in told.text

"""An edge device's settings, and how it answers over HTTP."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from openm6.core.errors import UsageError
from openm6.edge.cascade import CLOUD, EDGE
from openm6.edge.device import EdgeDevice, Settings, settings_of, settings_toml
from openm6.edge.service import key_of, make_app, serve
from openm6.inference.session import Session
from tests.edge.conftest import ASKED, CloudServer, Make, count_learned

pytestmark = pytest.mark.slow

QUESTION = "图中的商品是什么颜色？"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('privacy = "some"', "all, features, nothing"), ('cloud = "m6.example"', "give an address"),
        ('cloud = "http://a..b"', "give an address"), ('cloud = "http://m6/路"', "give an address"),
        ('cloud = "http://m6/?token=x"', "give an address"), ('cloud = "http://m6:pass@m6"', "a name in front"),
        ('name = "shop 1"', "letters, digits"), ('name = ""', "letters, digits"), ('name = ".."', "letters, digits"),
        ("deadline_ms = 10000000000000", "a day at most"),
        ("deadline_ms = 0", "above 0"), ('deadline_ms = "x"', "has to be int"), ("audit_rate = 2", "a fraction"),
        ("deferral_rate = 1", "below 1"), ("deferral_rate = 0.01", "above audit_rate"),
        ('cloud = "https://m6.example:x"', "give an address"), ("statistics_minutes = inf", "has to be a number"),
        ('key = "m6-4f1c"', "the name of an environment variable"),
        ('clout = "x"', 'Did you mean "cloud"'), ("cloud =", "edge.toml"), ("offline = 1", "has to be bool"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(line: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(line + "\n", "utf-8")
    with pytest.raises(UsageError, match=sentence):
        EdgeDevice(tmp_path)


@pytest.mark.parametrize("name", ["privacy", "offline", "encrypt"])
def test_a_file_that_was_cut_allows_nothing_by_default(name: str, tmp_path: Path) -> None:
    text = settings_toml(Settings(cloud="http://m6", privacy="nothing"))
    (tmp_path / "edge.toml").write_text(text[: text.index(f"\n{name} =")], "utf-8")
    with pytest.raises(UsageError, match=f"lacks .*{name}"):
        EdgeDevice(tmp_path)


def test_a_key_that_no_request_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASK_KEY", "secret\n")
    with pytest.raises(UsageError, match=r"\$ASK_KEY has characters") as refused:
        key_of("ASK_KEY")
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("ASK_KEY", "secret")
    assert key_of("ASK_KEY") == "secret" and key_of("") == ""


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an edge device"):
        EdgeDevice(tmp_path)
    assert settings_of({}) == Settings()
    text = settings_toml(Settings(privacy="features", offline=True))
    (tmp_path / "edge.toml").write_text(text, "utf-8")
    assert EdgeDevice(tmp_path).settings == Settings(privacy="features", offline=True)


def test_over_http(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url)
    photo = base64.b64encode(ASKED["vqa"]["photo"]).decode()
    asked = {"inputs": {"photo": photo, "question": QUESTION}}
    with TestClient(make_app(cascade), base_url="http://127.0.0.1") as client:
        assert client.get("/healthz").text == "ok"
        answer = client.post("/v1/tasks/vqa", json=asked).json()
        assert answer["outputs"] == {"answer": "云"} and answer["by"] == CLOUD and 0 <= answer["probability"] < 0.5
        assert (
            client.post("/v1/tasks/item_vector", json={"inputs": {"photo": photo, "title": "帽子"}}).json()["by"]
            == EDGE
        )
        assert {one["name"] for one in client.get("/v1/tasks").json()["data"]} == set(ASKED)
        assert client.get("/v1/tasks/vqa").json()["slots"]["photo"] == "image"
        told = client.get("/v1/status").json()
        assert told["kept"]["answers"] == {"vqa": 1} and told["tasks"]["vqa"]["deferred"] == 1
        assert 'openm6_edge_requests_total{task="vqa",what="requests"} 1' in client.get("/metrics").text
        for body, status, sentence in (
            ({"inputs": {"photo": "/etc/passwd", "question": "x"}}, 400, "base64"),
            ({"inputs": {"photo": photo}}, 400, "question is missing"), ({"inputs": []}, 400, "an object too"),
            ({"inputs": {"photo": {"path": "x"}, "question": "x"}}, 400, "base64"),
            ({**asked, "seconds": -1}, 400, "seconds"), ([], 400, "an object"),
            ({**asked, "truncate": "end"}, 400, 'truncate is "end"'), ({**asked, "truncate": []}, 400, "truncate is"),
            ({**asked, "decoding": {"temperature": 1}}, 400, "takes no decoding"),
            ({**asked, "truncat": "start"}, 400, 'Did you mean "truncate"'),
            ({"inputs": {"photo": base64.b64encode(b"no picture").decode(), "question": "x"}}, 400, "picture"),
        ):  # fmt: skip
            found = client.post("/v1/tasks/vqa", json=body)
            assert found.status_code == status and sentence in found.json()["error"]["message"], found.text
        assert client.post("/v1/tasks/vqa", content=b"{").status_code == 400
        assert client.post("/v1/tasks/vqaa", json=asked).status_code == 404
        assert client.get("/v1/tasks", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/v1/tasks", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    with TestClient(make_app(cascade, "secret", False), base_url="http://device.example") as client:
        assert client.get("/v1/tasks").status_code == 401
        assert client.get("/v1/tasks", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/healthz").status_code == 200
    with pytest.raises(UsageError, match="--key-env"):
        serve(cascade, "0.0.0.0", 8100)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for address, key in (("127.0.0.1", ""), ("0.0.0.0", "secret")):
            with pytest.raises(UsageError, match=f"cannot listen on port {port}"):
                serve(cascade, address, port, key)
        with pytest.raises(UsageError, match=f"cannot listen on port {port}"):
            serve(cascade, "0.0.0.0", port, anyone=True)


def test_a_question_that_is_too_long_is_refused_and_not_sent(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url)
    photo = base64.b64encode(ASKED["vqa"]["photo"]).decode()
    with TestClient(make_app(cascade), base_url="http://127.0.0.1") as client:
        for question, sentence in (("红" * 500, "positions; the model takes"), ("红" * 10**6, "1,000,000 characters")):
            found = client.post("/v1/tasks/vqa", json={"inputs": {"photo": photo, "question": question}})
            told = found.json()["error"]
            assert (
                found.status_code == 400 and told["code"] == "context_length_exceeded" and sentence in told["message"]
            )
        assert client.post("/v1/tasks/vqaa", json={"inputs": {}}).json()["error"]["code"] == "task_not_found"
        half = client.post("/v1/tasks/vqa", content='{"inputs": {"photo": "' + photo + '", "question": "\\ud800"}}')
        assert half.status_code == 400 and "question: is no text" in half.json()["error"]["message"]
    assert not server.seen


@pytest.mark.parametrize("cloud_cuts", [False, True])
def test_a_question_that_is_too_long_may_lose_its_beginning(
    cloud_cuts: bool, device: Make, server: CloudServer, session: Session
) -> None:
    """Here and at the cloud. What was left out is told, and the shortened question is not learned from."""
    cascade = device(cloud=server.url)
    server.act = lambda path, body: (200, {"outputs": {"answer": "云"}, **({"truncated": 7} if cloud_cuts else {})})
    photo, long = base64.b64encode(ASKED["vqa"]["photo"]).decode(), "红" * 500 + QUESTION
    asked = {"inputs": {"photo": photo, "question": long}, "truncate": "start"}
    with TestClient(make_app(cascade), base_url="http://127.0.0.1") as client:
        found = client.post("/v1/tasks/vqa", json=asked).json()
        assert found["by"] == CLOUD and found.get("truncated") == (7 if cloud_cuts else None)
        _, body, _ = server.seen[0]
        assert body["truncate"] == "start" and body["inputs"]["question"] == long
        assert not cascade.kept.counts() and count_learned(cascade) == 1
        server.act = lambda path, body: (500, {})
        found = client.post("/v1/tasks/vqa", json=asked).json()
        assert found["by"] == EDGE and found["truncated"] > 0
        assert found["outputs"] == {
            "answer": session.run("vqa", truncate="start", **{**ASKED["vqa"], "question": long})
        }
        short = {**asked, "inputs": {"photo": photo, "question": QUESTION}}
        assert "truncated" not in client.post("/v1/tasks/vqa", json=short).json()
        client.post("/v1/tasks/vqa", json={**short, "truncate": None, "decoding": {}, "allow_untrained": True})
    assert [("truncate" in body) for _, body, _ in server.seen] == [True, True, True, False]

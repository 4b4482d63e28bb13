"""edge.toml is changed while the device answers: from the next request on the new settings hold."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from openm6.edge.answer_store import new_key
from openm6.edge.cascade import CLOUD, EDGE, Cascade, Reply
from openm6.edge.device import EdgeDevice, settings_of, settings_toml
from openm6.edge.service import make_app
from tests.edge.conftest import ASKED, CloudServer, Make, calibrate

pytestmark = pytest.mark.slow

PHOTO, QUESTION = ASKED["vqa"]["photo"], "图中的商品是什么颜色？"


def _ask(cascade: Cascade, question: str = QUESTION) -> Reply:
    return cascade.answer("vqa", {"photo": PHOTO, "question": question})


def _change(cascade: Cascade, **settings: Any) -> None:
    """Write edge.toml, as an editor does."""
    before = EdgeDevice(cascade.device.path).settings
    values = {name: getattr(before, name) for name in before.__slots__} | settings
    (cascade.device.path / "edge.toml").write_text(settings_toml(settings_of(values)), "utf-8")


def _lies_on_disk(cascade: Cascade, *contents: bytes) -> bool:
    """True if any of these, or its base64, is in the store or beside it."""
    there = b"".join(file.read_bytes() for file in cascade.device.path.glob("kept*"))
    return any(one[:60] in there or base64.b64encode(one)[:60] in there for one in contents)


def test_a_stricter_mode_holds_from_the_next_request_on(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url)
    assert _ask(cascade).by == CLOUD and _lies_on_disk(cascade, PHOTO)
    _change(cascade, privacy="features")
    assert _ask(cascade).by == CLOUD
    assert set(server.seen[-1][1]["inputs"]["photo"]) == {"features", "rows", "columns", "image_encoder"}
    assert not _lies_on_disk(cascade, PHOTO) and cascade.kept.counts() == {"vqa": 1}
    _change(cascade, privacy="nothing")
    assert (_ask(cascade).by, _ask(cascade).reason) == (EDGE, "nothing may be sent")
    cascade.report()
    assert len(server.seen) == 2 and cascade.kept.counts() == {}
    assert not _lies_on_disk(cascade, PHOTO, QUESTION.encode(), "云".encode())
    _change(cascade, privacy="all")
    assert _ask(cascade).by == CLOUD and cascade.kept.counts() == {"vqa": 1}


@pytest.mark.parametrize("privacy", ["features", "nothing"])
def test_an_answer_on_its_way_is_kept_as_the_mode_of_its_arrival_allows(
    privacy: str, device: Make, server: CloudServer
) -> None:
    cascade = device(cloud=server.url)

    def answer_after_a_change(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        _change(cascade, privacy=privacy)
        return 200, {"outputs": {"answer": "云"}}

    server.act = answer_after_a_change
    assert _ask(cascade).by == CLOUD
    assert cascade.kept.counts() == ({"vqa": 1} if privacy == "features" else {})
    assert not _lies_on_disk(cascade, PHOTO)
    assert _lies_on_disk(cascade, QUESTION.encode()) is (privacy == "features")


def test_a_request_is_not_sent_again_under_a_stricter_mode(device: Make, server: CloudServer) -> None:
    """The link breaks while a request is at the cloud: it would be sent once more."""
    cascade = device(cloud=server.url)
    _ask(cascade)

    def break_after_a_change(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        _change(cascade, privacy="nothing")
        raise ConnectionAbortedError

    server.act = break_after_a_change
    reply = _ask(cascade)
    assert (reply.by, reply.reason) == (EDGE, "edge.toml was changed meanwhile")
    assert len(server.seen) == 2


TORN: dict[str, Callable[[str], str | None]] = {
    "a value that is refused": lambda text: text.replace('privacy = "all"', 'privacy = "nothin"'),
    "no TOML": lambda text: text.replace('privacy = "all"', "privacy = all"),
    "half of the file": lambda text: text[: text.index("# ", text.index("privacy ="))],
    "an empty file": lambda text: "",
    "no file": lambda text: None,
}


@pytest.mark.parametrize("spoil", TORN.values(), ids=TORN)
def test_what_cannot_be_used_sends_nothing(
    spoil: Callable[[str], str | None], device: Make, server: CloudServer, caplog: pytest.LogCaptureFixture
) -> None:
    cascade = device(cloud=server.url)
    _ask(cascade)
    file = cascade.device.path / "edge.toml"
    text = file.read_text("utf-8")
    spoiled = spoil(text)
    file.unlink() if spoiled is None else file.write_text(spoiled, "utf-8")
    for _ in range(2):
        reply = _ask(cascade)
        assert reply.by == EDGE and reply.reason == "edge.toml cannot be used, so that nothing is sent"
    assert len(server.seen) == 1 and cascade.kept.counts() == {"vqa": 1}
    with TestClient(make_app(cascade), base_url="http://127.0.0.1") as client:
        told = client.get("/v1/status").json()
    assert "edge.toml" in told["problem"] and told["settings"]["privacy"] == "all"
    assert caplog.text.count("Nothing is sent or stored until edge.toml can be used") == 1
    file.write_text(text, "utf-8")
    assert _ask(cascade).by == CLOUD and cascade.kept.counts() == {"vqa": 2}


def test_other_settings_are_taken_up_too(device: Make, server: CloudServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "openm6.edge")
    cascade = device(cloud=server.url)
    _change(cascade, model="goods", deadline_ms=1500)
    _ask(cascade)
    assert server.seen[-1][1]["model"] == "goods" and server.seen[-1][1]["seconds"] == 1.5
    assert "deadline_ms 3000 -> 1500" in caplog.text
    for changes, reason in (({"offline": True}, "offline"), ({"offline": False, "requests_per_hour": 1}, "used up")):
        _change(cascade, **changes)
        assert reason in _ask(cascade).reason
    _change(cascade, requests_per_hour=1000, cloud="http://127.0.0.1:1")
    assert "cannot be reached" in _ask(cascade).reason
    assert len(server.seen) == 1


def test_encryption_is_taken_up_or_nothing_more_is_kept(
    device: Make, server: CloudServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.delenv("DEVICE_KEY", raising=False)
    cascade = device(cloud=server.url)
    _ask(cascade)
    _change(cascade, encrypt="DEVICE_KEY")
    assert _ask(cascade).by == EDGE and "DEVICE_KEY" in cascade.live.follow().problem
    assert cascade.kept.counts() == {"vqa": 1}
    monkeypatch.setenv("DEVICE_KEY", new_key())
    _change(cascade, encrypt="DEVICE_KEY", name="again")
    assert _ask(cascade).by == CLOUD and cascade.kept.counts() == {"vqa": 2}
    assert not _lies_on_disk(cascade, PHOTO, QUESTION.encode())


def test_a_new_calibration_is_taken_up(device: Make, server: CloudServer, tmp_path: Path) -> None:
    cascade = device(cloud=server.url)
    _ask(cascade)
    assert cascade.statistics()["tasks"]["vqa"]["expected_alone"] < 0.2  # by made-up records, all of them wrong
    file = cascade.device.folder() / "package/calibration-vqa.npz"
    calibrate(file.parent, is_sure=True)
    time.sleep(1.1)  # it looks each second
    _ask(cascade)
    told = cascade.statistics()["tasks"]["vqa"]
    assert told["expected_alone"] > 0.8 and told["requests"] == 2

"""An edge device and its cloud: the source of an answer under any failure of the link, and the data sent and stored."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import time
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.edge.cascade import CLOUD, EDGE, Cascade
from openm6.edge.device import EdgeDevice
from openm6.edge.opening import store_summary
from openm6.edge.service import make_app
from tests.conftest import full_disk
from tests.edge.conftest import ASKED, PHOTO, QUESTIONS, CloudServer, Make
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow

QUESTION = "图中的商品是什么颜色？"


def like_the_edge(cascade: Cascade) -> Any:
    """A cloud that answers as the device's own model."""

    def act(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        record = {"photo": base64.b64decode(body["inputs"]["photo"]), "question": body["inputs"]["question"]}
        return 200, {"outputs": {"answer": cascade.model.answer("vqa", record).value}}

    return act


def answered(cascade: Cascade) -> list[str]:
    """The questions to which the device's own model says anything."""
    return [one for one in QUESTIONS if cascade.model.answer("vqa", {"photo": PHOTO, "question": one}).value.strip()]


def _ask(cascade: Cascade, question: str = QUESTION, **more: Any) -> Any:
    return cascade.answer("vqa", {"photo": PHOTO, "question": question}, **more)


def _files(cascade: Cascade) -> bytes:
    return b"".join(f.read_bytes() for f in cascade.device.path.glob("kept*"))


def test_who_answers(device: Make, server: CloudServer, session: Any) -> None:
    cascade = device(cloud=server.url, key="", name="shop-1")
    reply = _ask(cascade)
    assert (reply.value, reply.by, reply.reason) == ("云", CLOUD, "") and reply.probability < 0.5
    path, body, headers = server.seen[0]
    assert path == "/v1/tasks/vqa" and body["inputs"]["question"] == QUESTION
    assert base64.b64decode(body["inputs"]["photo"]) == ASKED["vqa"]["photo"]
    assert headers["Content-Type"] == "application/json" and body["seconds"] == 3.0
    [row] = cascade.kept.rows()
    assert row["value"] == "云" and row["record"]["photo"] == ASKED["vqa"]["photo"]
    assert row["edge"] == session.run("vqa", **ASKED["vqa"])
    # A task that is not calibrated is always answered here.
    reply = cascade.answer("caption", ASKED["caption"])
    assert (reply.by, reply.value, reply.probability) == (EDGE, session.run("caption", **ASKED["caption"]), None)
    vector = cascade.answer("item_vector", ASKED["item_vector"])
    assert vector.by == EDGE and vector.value.shape == (32,)
    assert len(server.seen) == 1
    with pytest.raises(UsageError, match="question is missing"):
        cascade.answer("vqa", {"photo": picture()})
    with pytest.raises(DataError, match="does not exist"):
        cascade.answer("vqa", {"photo": "nowhere.jpg", "question": QUESTION})


def test_what_is_sure_is_answered_here(device: Make, server: CloudServer) -> None:
    """But for audits, which are frequent at first."""
    cascade = device(sure=True, cloud=server.url)
    server.act = like_the_edge(cascade)
    questions = answered(cascade)
    replies = [_ask(cascade, questions[n % len(questions)]) for n in range(100)]
    told = cascade.statistics()["tasks"]["vqa"]
    # The least confident record of the calibration is the threshold itself, to the last bit.
    assert told["confident"] >= 99 - 100 // len(questions) and "differed" not in told
    assert told["audited"] >= 9 and told["agreed"] == len(server.seen) == len(list(cascade.kept.rows()))
    assert [reply.by for reply in replies[:9]] == [CLOUD] * 9  # of the ninth 30 / 28
    assert sum(reply.by == EDGE for reply in replies[60:]) > 15


def test_sure_answers_are_audited_and_it_learns(device: Make, server: CloudServer) -> None:
    """The cloud says otherwise each time: soon nothing is sure any more. After a restart it is remembered."""
    cascade = device(sure=True, cloud=server.url)
    before = [_ask(cascade, QUESTIONS[n % len(QUESTIONS)]).by for n in range(200)]
    assert before[-50:].count(CLOUD) > 40
    told = cascade.statistics()["tasks"]["vqa"]
    assert told["audited"] > 3 and told["differed"] > told.get("agreed", 0)
    threshold = cascade.statistics()["tasks"]["vqa"]["threshold"]
    cascade.close()
    again = Cascade(cascade.device.path, 1)
    _ask(again)
    assert again.statistics()["tasks"]["vqa"]["threshold"] == pytest.approx(threshold, abs=0.05)
    again.close()


def test_no_more_than_a_share_is_asked(device: Make, server: CloudServer) -> None:
    """Nothing is sure here, so that without a share all is asked."""
    cascade = device(cloud=server.url, deferral_rate=0.2)
    replies = [_ask(cascade, QUESTIONS[n % len(QUESTIONS)]) for n in range(150)]
    assert all(reply.by == CLOUD for reply in replies[:49])
    assert 0 < sum(reply.by == CLOUD for reply in replies[50:]) <= 0.35 * 100
    assert {reply.reason for reply in replies if reply.by == EDGE} == {"no more than 20% may be deferred"}
    told = cascade.statistics()["tasks"]["vqa"]
    assert told["spared"] == sum(reply.by == EDGE for reply in replies) and "confident" not in told


def test_the_least_sure_are_asked_where_all_are_sure(device: Make, server: CloudServer) -> None:
    cascade = device(sure=True, cloud=server.url, deferral_rate=0.2)
    server.act = like_the_edge(cascade)
    questions = answered(cascade)
    replies = [_ask(cascade, questions[n % len(questions)]) for n in range(150)]
    assert all(reply.by == EDGE for reply in replies[:49])
    asked = [reply.probability for reply in replies[50:] if reply.by == CLOUD]
    assert 5 < len(asked) <= 35 and max(asked) <= min(r.probability for r in replies[50:] if r.by == EDGE) + 0.05


def test_offline_it_says_so(device: Make, server: CloudServer) -> None:
    reply = _ask(device(cloud=server.url, offline=True))
    assert (reply.by, reply.reason) == (EDGE, "offline")
    assert _ask(device(cloud="")).reason == "offline"
    assert not server.seen


def test_with_features_no_picture_leaves_or_stays(device: Make, server: CloudServer, session: Any) -> None:
    cascade = device(cloud=server.url, privacy="features")
    assert _ask(cascade).by == CLOUD
    sent = server.seen[0][1]["inputs"]["photo"]
    assert set(sent) == {"features", "rows", "columns", "image_encoder"} and len(sent["image_encoder"]) == 16
    # The cloud's model answers to them what it answers to the picture.
    record = {"photo": sent, "question": QUESTION}
    assert session.run("vqa", **record) == session.run("vqa", **ASKED["vqa"])
    [row] = cascade.kept.rows()
    assert set(row["record"]["photo"]) == {"features", "rows", "columns", "image_encoder"}
    told = json.dumps(server.seen) + _files(cascade).decode("latin-1")
    photo = ASKED["vqa"]["photo"]
    assert base64.b64encode(photo).decode()[:60] not in told and photo[:60].decode("latin-1") not in told
    # What was kept is an input like any other.
    assert cascade.model.answer("vqa", row["record"]).value == cascade.model.answer("vqa", ASKED["vqa"]).value


def test_nothing_is_sent_or_kept(device: Make, server: CloudServer) -> None:
    everything = device(cloud=server.url)
    assert _ask(everything).by == CLOUD and len(server.seen) == 1
    everything.close()
    cascade = device(cloud=server.url, privacy="nothing")
    reply = _ask(cascade)
    assert (reply.by, reply.reason) == (EDGE, "nothing may be sent")
    cascade.report()
    assert len(server.seen) == 1
    photo = ASKED["vqa"]["photo"]
    content = _files(cascade)
    assert photo[:60] not in content and base64.b64encode(photo)[:60] not in content
    assert QUESTION.encode() not in content


def test_the_cloud_is_told_numbers_alone(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url, name="shop-1")
    _ask(cascade)
    server.act = lambda path, body: (200, {})
    cascade.report()
    path, body, _ = server.seen[-1]
    assert path == "/v1/edges/shop-1"
    told = json.dumps(body, ensure_ascii=False)
    assert QUESTION not in told and "云" not in told and "颜色" not in told
    assert body["tasks"]["vqa"]["deferred"] == 1
    from openm6.serve.hub_api import Statistics

    assert Statistics.model_validate(body).tasks["vqa"]["requests"] == 1
    with pytest.raises(ValueError, match="tasks"):
        Statistics.model_validate({**body, "tasks": {"vqa": {"question": QUESTION}}})
    with pytest.raises(UsageError, match="no field picture"):
        Statistics.model_validate({**body, "picture": "x"})


def test_a_full_disk_costs_no_answer(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url)
    cascade.model.processor = replace(cascade.model.processor, max_length=4096)
    with full_disk((cascade.device.path / "kept.sqlite").stat().st_size):
        for number in range(6):
            assert _ask(cascade, f"问题{number}" * 300).by == CLOUD
    assert cascade.statistics()["tasks"]["vqa"]["unwritten"] >= 5
    assert "cannot be written" in cascade.kept.trouble
    before = cascade.statistics()["tasks"].get("device", {}).get("unwritten", 0)
    with full_disk(0):  # the request cannot even be counted on the disk
        assert _ask(cascade).by == CLOUD
    assert cascade.statistics()["tasks"]["device"]["unwritten"] == before + 1


def test_without_a_store_it_answers_and_says_so(
    device: Make, server: CloudServer, caplog: pytest.LogCaptureFixture
) -> None:
    cascade = device(cloud=server.url)
    cascade.close()
    (cascade.device.path / "kept.sqlite").unlink()
    (cascade.device.path / "kept.sqlite").mkdir()
    with caplog.at_level(logging.WARNING, "openm6.edge"):
        cascade = Cascade(cascade.device.path, 1)
    assert "Nothing is stored: " in caplog.text and "kept.sqlite cannot be used" in caplog.text
    with TestClient(make_app(cascade), base_url="http://127.0.0.1") as client:
        photo = base64.b64encode(ASKED["vqa"]["photo"]).decode()
        found = client.post("/v1/tasks/vqa", json={"inputs": {"photo": photo, "question": QUESTION}}).json()
        assert found["by"] == CLOUD and found["outputs"] == {"answer": "云"}
        told = client.get("/v1/status").json()
        assert "Nothing is stored" in told["kept"]["trouble"] and told["tasks"]["vqa"]["unwritten"] == 1
        assert "openm6_edge_store_trouble 1" in client.get("/metrics").text
    cascade.close()


def test_a_store_that_is_damaged_while_it_is_used_costs_no_answer(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url)
    assert _ask(cascade).by == CLOUD
    file = cascade.device.path / "kept.sqlite"
    file.write_bytes(bytes(file.stat().st_size))
    assert _ask(cascade, "还有什么？").by == CLOUD
    assert cascade.statistics()["tasks"]["vqa"]["unwritten"] == 1
    with TestClient(make_app(cascade), base_url="http://127.0.0.1") as client:
        assert "cannot be used" in client.get("/v1/status").json()["kept"]["trouble"]
        assert "openm6_edge_store_trouble 1" in client.get("/metrics").text
    path = cascade.device.path
    cascade.close()
    again = Cascade(path, 1)
    assert store_summary(path, again.kept)["set_aside"] == ["kept.sqlite.damaged-1"] and _ask(again).by == CLOUD
    assert again.kept.counts() == {"vqa": 1}
    again.close()


def test_a_new_version_answers_when_it_is_whole(device: Make, server: CloudServer) -> None:
    cascade = device(sure=True, cloud="")
    _ask(cascade)
    path = cascade.device.path
    shutil.copytree(path / "versions/0001", path / "versions/0002")
    cascade.device.use("0002")
    time.sleep(1.1)  # it looks each second
    _ask(cascade)
    assert cascade.statistics()["version"] == "0002"
    (path / "current").write_text("0009\n")
    time.sleep(1.1)
    assert _ask(cascade).by == EDGE  # the one that is open goes on
    assert cascade.statistics()["version"] == "0002"
    with pytest.raises(OpenM6Error, match="no version"):
        Cascade(path)
    with pytest.raises(UsageError, match="no version 7"):
        EdgeDevice(path).use("7")

"""The cloud of an edge device: deadline, budget, and the reasons and counts of missing answers."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from openm6.edge.cascade import CLOUD, EDGE, Cascade
from openm6.edge.cloud import PAUSES, REASONS, Cloud, CloudError
from tests.edge.conftest import ASKED, CloudServer, Make, count_learned
from tests.edge.test_cascade import _ask
from tests.processes import free_port

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda path, body: (500, {}), "answered with 500"),
        (lambda path, body: (503, {}), "too much to do"),
        (lambda path, body: (504, {}), "took too long"),
        (lambda path, body: (401, {}), "refuses the key"),
        (lambda path, body: (400, {"error": {"code": "context_length_exceeded"}}), "too long for the cloud's model"),
        (lambda path, body: (404, {"error": {"code": "task_not_found"}}), "does not know the task"),
        (lambda path, body: (409, {"error": {"code": "other_image_encoder"}}), "another image encoder"),
        (lambda path, body: (400, {"error": {"code": "invalid"}}), "not of the expected form"),
        (lambda path, body: (200, {"outputs": {"caption": "x"}}), "not of the expected form"),
        (lambda path, body: (200, {"outputs": {"answer": ["x"]}}), "not of the expected form"),
        (lambda path, body: (200, b"<html>"), "not of the expected form"),
        (lambda path, body: (200, []), "not of the expected form"),
        (lambda path, body: (200, b"[" * 100_000), "not of the expected form"),
        (lambda path, body: (200, {"outputs": {"answer": ""}}), "answer is empty"),
        (lambda path, body: (200, {"outputs": {"answer": " \n"}, "finished": False}), "answer is empty"),
        (lambda path, body: (_ for _ in ()).throw(ConnectionAbortedError()), "cannot be reached"),
    ],
)
def test_a_cloud_that_fails_leaves_the_answer_here(
    act: Any, reason: str, device: Make, server: CloudServer, session: Any
) -> None:
    cascade = device(cloud=server.url)
    server.act = act
    reply = _ask(cascade)
    assert reply.by == EDGE and reason in reply.reason and reply.value == session.run("vqa", **ASKED["vqa"])
    assert not list(cascade.kept.rows())
    counts = cascade.statistics()["tasks"]["vqa"]
    [kind] = [name for name in counts if name.startswith("unanswered_")]
    assert reason in REASONS[kind.removeprefix("unanswered_")].message or kind == "unanswered_error"
    assert counts["deferred"] == counts["unanswered"] == counts[kind] == 1


def test_an_answer_that_was_cut_off_is_given_and_not_learned(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url)
    server.act = lambda path, body: (200, {"outputs": {"answer": "云"}, "finished": False})
    reply = _ask(cascade)
    assert (reply.value, reply.by, reply.finished) == ("云", CLOUD, False)
    assert not list(cascade.kept.rows()) and not count_learned(cascade)
    counts = cascade.statistics()["tasks"]["vqa"]
    assert counts["unfinished"] == 1 and "differed" not in counts


def test_one_request_that_is_too_long_stops_no_other(server: CloudServer) -> None:
    server.act = lambda path, body: (
        (400, {"error": {"code": "context_length_exceeded"}})
        if body["inputs"]
        else (200, {"outputs": {"answer": "云"}})
    )
    cloud = Cloud(server.url)
    for _ in range(5):
        with pytest.raises(CloudError, match="too long"):
            cloud.ask("vqa", {"question": "红" * 99}, 5.0)
    assert cloud.ask("vqa", {}, 5.0)["outputs"] == {"answer": "云"}
    cloud.close()


@pytest.mark.parametrize("key", ["m6-secret\n", "钥匙"])
def test_a_key_that_cannot_be_sent_costs_no_answer(
    key: str, device: Make, server: CloudServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M6_KEY", key)
    cascade = device(cloud=server.url, key="M6_KEY")
    reply = _ask(cascade)
    assert reply.by == EDGE and "the key has characters that cannot be sent" in reply.reason
    counts = cascade.statistics()["tasks"]["vqa"]
    assert counts["unanswered_key"] == 1 and "deferred" not in counts
    assert any(one.fails and "cannot be sent" in one.message for one in cascade.check_cloud())
    assert not server.seen and not server.read


def test_a_wrong_key_is_told_every_time(device: Make, server: CloudServer, caplog: pytest.LogCaptureFixture) -> None:
    """Not asked again each time, though."""
    server.act = lambda path, body: (401, {"error": {"code": "invalid_api_key"}})
    cascade = device(cloud=server.url)
    with caplog.at_level(logging.WARNING, "openm6.edge"):
        assert {_ask(cascade).reason for _ in range(6)} == {"the cloud refuses the key"}
    assert caplog.messages.count("the cloud refuses the key") == 1
    counts = cascade.statistics()["tasks"]["vqa"]
    assert counts["unanswered_key"] == 6 and counts["deferred"] == len(server.seen) == 1
    with pytest.raises(CloudError, match="refuses the key"):
        cascade.report()


def test_an_outage_spends_nothing(device: Make, server: CloudServer) -> None:
    """Of three requests that an hour has, none is used up by a cloud that cannot be reached, before or after one."""
    cascade = device(cloud=server.url, requests_per_hour=3)
    assert _ask(cascade, "一").by == CLOUD
    server.close()
    server.drop_connections()
    for number in range(8):
        assert _ask(cascade, f"{number}").reason == "the cloud cannot be reached"
    counts = cascade.statistics()["tasks"]["vqa"]
    assert counts["deferred"] == 1 and counts["unanswered_unreachable"] == 8
    back = CloudServer(server.http.server_address[1])
    time.sleep(PAUSES[0] + 0.1)
    assert [_ask(cascade, f"再{number}").by for number in range(3)] == [CLOUD, CLOUD, EDGE]
    assert len(server.seen) + len(back.seen) == cascade.statistics()["tasks"]["vqa"]["deferred"] == 3
    assert cascade.statistics()["tasks"]["vqa"]["unanswered_budget"] == 1
    cascade.close()
    again = Cascade(cascade.device.path, 1)
    assert "used up" in _ask(again).reason
    again.close()
    back.close()


def test_no_more_leave_than_an_hour_has_whoever_asks_at_once(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url, requests_per_hour=4, deadline_ms=20_000)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: _ask(cascade, f"问{number}"), range(24)))
    assert len(server.seen) == sum(reply.by == CLOUD for reply in replies) == 4


def test_why_the_cloud_was_not_asked_is_counted(device: Make, server: CloudServer) -> None:
    for settings, kind in (
        ({"privacy": "nothing"}, "privacy"), ({"offline": True}, "offline"), ({"requests_per_hour": 0}, "budget"),
    ):  # fmt: skip
        cascade = device(cloud=server.url, **settings)
        _ask(cascade)
        counts = cascade.statistics()["tasks"]["vqa"]
        assert counts[f"unanswered_{kind}"] == 1 and "deferred" not in counts
    assert not server.seen


def test_a_cut_link_is_left_alone_and_found_again() -> None:
    port = free_port()  # that nobody listens at
    now = [1000.0]
    cloud = Cloud(f"http://127.0.0.1:{port}", clock=lambda: now[0])
    for _ in range(3):
        with pytest.raises(CloudError, match="cannot be reached"):
            cloud.ask("vqa", {}, 1.0)
    server = CloudServer(port)  # it is there again, but nobody looks yet
    with pytest.raises(CloudError, match="cannot be reached"):
        cloud.ask("vqa", {}, 1.0)
    assert not server.seen
    now[0] += 3
    assert cloud.ask("vqa", {}, 1.0) == {"outputs": {"answer": "云"}}
    assert cloud.ask("vqa", {}, 1.0) == {"outputs": {"answer": "云"}}
    cloud.close()
    server.close()


def test_a_deadline_holds_and_a_late_answer_is_kept(device: Make, server: CloudServer) -> None:
    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.6)
        return 200, {"outputs": {"answer": "晚"}}

    server.act = slow
    cascade = device(cloud=server.url, deadline_ms=200)
    cascade.answer("caption", ASKED["caption"])  # the first answer of a session takes longer
    started = time.monotonic()
    reply = _ask(cascade)
    assert reply.by == EDGE and "took too long" in reply.reason
    assert time.monotonic() - started < 0.55
    cascade2 = device(cloud=server.url, deadline_ms=20_000)
    started = time.monotonic()
    assert "took too long" in _ask(cascade2, seconds=0.1).reason
    assert time.monotonic() - started < 0.55


def test_a_late_answer_teaches(server: CloudServer) -> None:
    """Its head comes within the deadline and its body after it: what it says is still worth something."""

    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.4)
        return 200, {"outputs": {"answer": "晚"}}

    server.act, server.pause = slow, 0.4
    cloud, late = Cloud(server.url), []
    with pytest.raises(CloudError, match="too long"):
        cloud.ask("vqa", {}, 0.6, late.append)
    for _ in range(100):
        if late:
            break
        time.sleep(0.02)
    assert late == [{"outputs": {"answer": "晚"}}]
    cloud.close()


def test_the_hours_requests_are_counted(device: Make, server: CloudServer) -> None:
    cascade = device(cloud=server.url, requests_per_hour=2)
    assert [_ask(cascade, str(n)).by for n in range(3)] == [CLOUD, CLOUD, EDGE]
    assert "used up" in _ask(cascade).reason and len(server.seen) == 2
    cascade.close()
    again = Cascade(cascade.device.path, 1)  # a restart is no new hour
    assert _ask(again).by == EDGE
    again.close()
    later = Cascade(cascade.device.path, 1, clock=lambda: time.time() + 3600)
    assert _ask(later).by == CLOUD
    later.close()

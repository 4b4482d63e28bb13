"""What a request may be, before any model is asked: its type, size and speed, and what is said of mistakes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, UploadFile
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pydantic import Field

from openm6.cli.serve import check_origins
from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.serve import guard
from openm6.serve.api import create_app
from openm6.serve.bodies import Fields, Route
from openm6.serve.fleet import Fleet
from openm6.serve.guard import Guard, add_errors, sse
from openm6.serve.keys import Keys
from openm6.serve.listen import Connection, Lag, bind
from openm6.serve.server import Options

MIB = 2**20


class Part(Fields):
    prefix: ClassVar = "parts."

    role: str = ""


class Asked(Fields):
    text: str
    number: int = 0
    parts: list[Part] = Field(default_factory=list)


class _Hasty(Connection):
    seconds = 0.5


class Site:
    """A server of a few routes behind the guard, on a port of its own; `is_busy` as a test says."""

    def __init__(self, seconds: float = 0.5, **limits: int) -> None:
        self.is_busy = False
        self.app = app = FastAPI()
        app.router.route_class = Route
        app.add_middleware(
            Guard, most=4 * MIB, full=lambda: False, busy=lambda: self.is_busy, seconds=seconds,
            texts_only=lambda path: path.endswith("texts"), **limits,
        )  # fmt: skip
        add_errors(app)
        self._routes()
        config = uvicorn.Config(app, port=0, http=_Hasty, log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)

    def _routes(self) -> None:
        app = self.app

        @app.post("/v1/tasks/echo")
        @app.post("/v1/tasks/texts")
        async def echo(asked: Asked) -> dict[str, Any]:
            return {"length": len(asked.text)}

        @app.post("/v1/tasks/file")
        async def file(image: UploadFile) -> dict[str, Any]:
            return {"length": len(await image.read())}

        @app.get("/")
        async def page() -> str:
            return "page"

        @app.get("/v1/things/{name}")
        async def thing(name: str) -> dict[str, Any]:
            return {"name": name}

        @app.delete("/v1/things/{name}")
        async def remove(name: str) -> None: ...

        @app.get("/v1/wrong/{how}")
        async def wrong(how: str) -> Any:
            if how == "broken":
                raise RuntimeError("secret")
            if how == "internal":
                raise Refusal(ErrorKind.INTERNAL, "The request failed (KeyError).")
            if how == "stopping":
                raise Refusal(ErrorKind.STOPPING, "The server is stopping.")
            return JSONResponse({"value": {"nan": float("nan"), "half": "\ud83d"}[how]})

        @app.get("/v1/stream/{how}")
        async def stream(how: str) -> Any:
            async def events() -> AsyncIterator[dict[str, Any]]:
                yield {"piece": "a"}
                if how == "broken":
                    raise RuntimeError("secret")
                yield {"piece": {"nan": float("nan"), "half": "\ud83d"}[how]}

            return await sse(events())

    def connect(self, head: str, body: bytes = b"") -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        one.sendall(head.replace("\n", "\r\n").encode() + body)
        return one

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.stop()


def error_in(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    assert found.keys() == {"message", "type", "code", "param"} and answer.headers["x-request-id"]
    return found


def received(connection: socket.socket) -> bytes:
    """Until the server closes the connection."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b'{"text": "a",}', "invalid_json", "line 1, column 14"), (b'{"text": \n"a"', "invalid_json", "line 2"),
        (b"hello", "invalid_json", "is not JSON"), (b"\xff{}", "invalid_json", "not UTF-8 .byte 0"),
        (b'{"text": "\\ud83d"}', "invalid_json", "half a character"),
        (b'{"\\udc00": 1, "text": "a"}', "invalid_json", "half a character"),
        (b'{"text": "a", "number": NaN}', "invalid_json", "NaN"), (b'{"number": 1e999}', "invalid_json", "too large"),
        (b'{"text": "a", "text": "b"}', "invalid_json", "'text' twice"),
        (b'{"text": ' + b"[" * 5000, "invalid_json", "levels"), (b"[1]", "invalid_type", "not a list"),
        (b"", "missing_required_parameter", "The body is missing"), (b"{}", "missing_required_parameter", "text is"),
        (b'{"text": 1}', "invalid_type", "text: .*string"), (b'"text"', "invalid_type", "has to be a JSON object"),
        (b'{"text": "a", "parts": ["b"]}', "invalid_type", "parts.0 has to be a JSON object"),
        (b'{"text": "a", "nummber": 1}', "unknown_parameter", 'no field nummber. Did you mean "number"'),
        (b'{"text": "a", "zzz": 1}', "unknown_parameter", "It takes text, number, parts"),
        (b'{"text": "a", "parts": [{"rol": "x"}]}', "unknown_parameter", 'parts.rol. Did you mean "role"'),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_meant_is_refused_by_name(site: Site, body: bytes, code: str, words: str) -> None:
    answer = site.http.post("/v1/tasks/echo", content=body, headers={"content-type": "application/json"})
    error = error_in(answer, 400)
    assert error["code"] == code and error["type"] == "invalid_request_error"
    assert re.search(words, error["message"]), error["message"]
    if code in ("missing_required_parameter", "unknown_parameter") and body:
        assert error["param"]


def test_large_json_is_read_by_the_same_rules(site: Site) -> None:
    text = "红" * MIB
    assert site.http.post("/v1/tasks/echo", json={"text": text}).json() == {"length": len(text)}
    body = json.dumps({"text": text}, ensure_ascii=False)[:-2] + '\\ud83d"}'
    headers = {"content-type": "application/json"}
    answer = site.http.post("/v1/tasks/echo", content=body.encode(), headers=headers)
    assert "half a character" in error_in(answer, 400)["message"]


@pytest.mark.parametrize(
    ("path", "headers", "words"),
    [
        ("echo", {}, "has no Content-Type: send it as application/json"),
        ("echo", {"content-type": "text/plain"}, "sent as text/plain"),
        ("echo", {"content-type": "multipart/form-data; boundary=x"}, "send it as application/json"),
        ("echo", {"content-type": "application/json; charset=gbk"}, "in UTF-8, not in gbk"),
        ("echo", {"content-type": "application/json", "content-encoding": "gzip"}, "encoded as gzip"),
        ("file", {"content-type": "application/json"}, "send it as multipart/form-data"), ("file", {}, "multipart"),
    ],
)  # fmt: skip
def test_a_body_of_another_type_is_refused(site: Site, path: str, headers: dict[str, str], words: str) -> None:
    answer = site.http.post(f"/v1/tasks/{path}", content=b'{"text": "a"}', headers=headers)
    assert words in error_in(answer, 415)["message"]
    for kind in ("application/json; charset=UTF-8", "application/problem+json"):
        accepted = site.http.post("/v1/tasks/echo", content=b'{"text": "a"}', headers={"content-type": kind})
        assert accepted.status_code == 200
    assert site.http.post("/v1/tasks/file", files={"image": b"abc"}).json() == {"length": 3}
    error = error_in(site.http.post("/v1/tasks/file", data={"image": "abc"}), 400)
    assert (error["message"], error["param"]) == ("image has to be sent as a file.", "image")


@pytest.mark.parametrize("how", ["broken", "nan", "half", "internal"])
def test_an_unforeseen_error_is_told_with_its_request(site: Site, how: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = site.http.get(f"/v1/wrong/{how}")
    error = error_in(answer, 500)
    identity = answer.headers["x-request-id"]
    assert identity in error["message"] and error["code"] == "internal" and "secret" not in answer.text
    lines = [json.loads(one.message) for one in caplog.records if one.name == "openm6.access"]
    assert [(one["request"], one["status"], one["code"]) for one in lines] == [(identity, 500, "internal")]
    if how != "internal":  # that one is logged where it happened, in the model's process
        [told] = [one for one in caplog.records if one.name == "openm6.serve"]
        assert identity in told.message and told.exc_info


@pytest.mark.parametrize("how", ["broken", "nan", "half"])
def test_an_unforeseen_error_in_a_stream_is_its_last_event(site: Site, how: str) -> None:
    answer = site.http.get(f"/v1/stream/{how}")
    first, last = (json.loads(line[6:]) for line in answer.text.split("\n\n") if line)
    assert first == {"piece": "a"} and answer.headers["x-request-id"] in last["error"]["message"]


def test_a_server_that_stops_says_so_by_its_status(site: Site) -> None:
    answer = site.http.get("/v1/wrong/stopping")
    assert error_in(answer, 503)["code"] == "stopping" and answer.headers["retry-after"]


def test_methods_of_a_path(site: Site) -> None:
    answer = site.http.put("/v1/things/a")
    assert error_in(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    asked = site.http.options("/v1/things/a")
    assert asked.status_code == 204 and asked.headers["allow"] == answer.headers["allow"]
    head = site.http.head("/v1/things/a")
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == "12"
    assert site.http.head("/").status_code == site.http.get("/").status_code == 200
    assert "GET /v1/nothing" in error_in(site.http.get("/v1/nothing"), 404)["message"]
    assert site.http.options("/v1/nothing").status_code == 404 and site.http.head("/v1/nothing").status_code == 404


HEAD = "POST /v1/tasks/{} HTTP/1.1\nHost: 127.0.0.1\nContent-Type: application/json\nContent-Length: {}\n\n"


@pytest.mark.slow
def test_a_body_that_is_not_sent_ends(site: Site) -> None:
    """The connection is closed, too: what comes of the body later is no request."""
    for body in (b"", b'{"text": "'):
        with site.connect(HEAD.format("echo", 1000), body) as one:
            told = received(one)
        assert told.startswith(b"HTTP/1.1 408") and b'"request_timeout"' in told and b"connection: close" in told


def test_a_body_that_trickles_ends(site: Site) -> None:
    with site.connect(HEAD.format("echo", 100_000)) as one:
        one.settimeout(0.1)
        told, sent = b"", 0
        while not told:
            one.sendall(b" ")
            sent += 1
            assert sent < 100
            try:
                told = one.recv(65536)
            except TimeoutError:
                continue
    assert told.startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_head_that_is_not_sent_ends(site: Site) -> None:
    for head in ("", "POST /v1/tasks/echo HTTP/1.1\nHost: "):
        with site.connect(head) as one:
            assert received(one) == b""
    with site.connect("GET /v1/things/a HTTP/1.1\nHost: 127.0.0.1\n\n") as one:
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        one.sendall(b"GET /v1")
        assert received(one) == b""


def test_what_is_not_http_is_told_in_json(site: Site) -> None:
    with site.connect("HELLO\n\n") as one:
        told = received(one)
    assert (
        told.startswith(b"HTTP/1.1 400")
        and json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    )


def test_of_too_many_bodies_on_their_way_the_stalest_is_given_up() -> None:
    """Others are not kept from asking by bodies that do not come."""
    site = Site(seconds=600, most_open=3)
    body = b'{"text": "a"}'
    waiting = [site.connect(HEAD.format("echo", len(body)), body[:5]) for _ in range(4)]
    assert waiting[0].recv(65536).startswith(b"HTTP/1.1 408")
    for one in waiting[1:]:
        one.sendall(body[5:])
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
    assert site.http.post("/v1/tasks/echo", json={"text": "a"}).status_code == 200
    for one in waiting:
        one.close()
    site.stop()


@pytest.mark.slow
def test_a_large_text_is_refused_before_it_is_sent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no picture can come; elsewhere while the server is busy."""
    monkeypatch.setattr(guard, "LINGER", 0.2)
    with site.connect(HEAD.format("texts", 2 * MIB)) as one:
        told = received(one)
    assert told.startswith(b"HTTP/1.1 413") and b"at most 1 MiB" in told and b"connection: close" in told
    with site.connect(HEAD.format("echo", 5 * MIB)) as one:
        assert b"at most 4 MiB" in received(one)
    site.is_busy = True
    try:
        with site.connect(HEAD.format("echo", 2 * MIB)) as one:
            assert received(one).startswith(b"HTTP/1.1 429")
        chunked = (
            "POST /v1/tasks/echo HTTP/1.1\nHost: a\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
        )
        with site.connect(chunked, b"100008\r\n" + b" " * 0x100008 + b"\r\n") as one:
            assert received(one).startswith(b"HTTP/1.1 429")
        assert site.http.post("/v1/tasks/echo", json={"text": "a"}).status_code == 200
    finally:
        site.is_busy = False
    assert site.http.post("/v1/tasks/echo", json={"text": "a" * 2 * MIB}).status_code == 200


@pytest.mark.slow
def test_a_loop_that_has_been_busy_for_long_is_seen_to_be_behind_until_it_has_caught_up() -> None:
    async def run() -> list[bool]:
        lag = Lag()
        following = asyncio.create_task(lag.follow())
        seen = [lag.is_long]
        for seconds in (0.0, 1.0, 0.0):
            await asyncio.sleep(0.3)
            time.sleep(seconds)
            seen.append(lag.is_long)
        following.cancel()
        return seen

    assert asyncio.run(run()) == [False, False, True, False]


@pytest.mark.slow
def test_an_answer_to_a_body_that_is_not_read_arrives(site: Site) -> None:
    """The client is still sending when it comes."""
    with site.connect(HEAD.format("texts", 8 * MIB)) as one:

        def send() -> None:
            with suppress(OSError):
                one.sendall(b" " * 8 * MIB)

        sending = threading.Thread(target=send)
        sending.start()
        assert one.recv(65536).startswith(b"HTTP/1.1 413")
        one.shutdown(socket.SHUT_RDWR)
        sending.join(20)
    asked = site.http.post("/v1/tasks/texts", content=b" " * 8 * MIB)
    assert error_in(asked, 413)["code"] == "too_large"


def test_a_port_that_is_taken_is_told() -> None:
    [one] = bind("127.0.0.1", 0)
    one.listen()
    port = one.getsockname()[1]
    with pytest.raises(UsageError, match=f"Port {port} of 127.0.0.1 is taken"):
        bind("127.0.0.1", port)
    one.close()
    for other in bind("127.0.0.1", port):
        other.close()
    with pytest.raises(UsageError, match="nowhere.invalid cannot listen"):
        bind("nowhere.invalid", 0)


def test_pages_about_the_api_are_behind_the_key(tmp_path: Any) -> None:
    secret = Keys(tmp_path / "keys.json").add("anna")
    client = TestClient(create_app(Fleet(), Options(keys=tmp_path / "keys.json")))
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/v1/nothing", "/v1/models"):
        assert client.get(path).status_code == 401
        status = client.get(path, headers={"authorization": f"Bearer {secret}"}).status_code
        assert status == (404 if path == "/v1/nothing" else 200)
    # Nobody's body is read before it is known who asks.
    assert client.post("/v1/tasks/write", content=b"{").status_code == 401
    assert TestClient(create_app(Fleet(), Options())).get("/docs").status_code == 200


def test_origins_are_taken_as_browsers_write_them() -> None:
    check_origins(["https://shop.example", "https://shop.example:8443", "http://localhost:3000", "http://[::1]:443"])


def test_pages_of_listed_origins_may_ask_the_api_alone() -> None:
    shop = "https://shop.example"
    client = TestClient(create_app(Fleet(), Options(loopback=True, origins=(shop,))), base_url="http://127.0.0.1:8000")
    cross = {"origin": shop, "sec-fetch-site": "cross-site"}
    answer = client.get("/v1/models", headers=cross)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == shop
    asks = {**cross, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = client.options("/v1/chat/completions", headers=asks)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-headers"] == "authorization"
    refused = client.get("/v1/models", headers={**cross, "host": "evil.example"})
    assert refused.status_code == 403 and refused.headers["access-control-allow-origin"] == shop
    other = client.get("/v1/models", headers={**cross, "origin": "https://other.example"})
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers
    assert client.get("/metrics", headers=cross).status_code == 403
    closed = TestClient(create_app(Fleet(), Options(loopback=True)), base_url="http://127.0.0.1:8000")
    assert closed.get("/v1/models", headers=cross).status_code == 403


def test_counters_are_counters() -> None:
    client = TestClient(create_app(Fleet(), Options()))
    client.get("/v1/nothing")
    page = client.get("/metrics").text
    assert 'openm6_http_responses_total{status="404"} 1.0' in page
    for name in ("restarts", "energy_kwh", "busy_seconds"):
        assert f"# TYPE openm6_{name}_total counter" in page

"""The clients against a server whose answers the test writes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6 import AsyncClient, Candidate, Client, UsageError
from openm6.client import ServerError
from openm6.core.errors import ContextLengthError

TASKS: dict[str, dict[str, Any]] = {
    "vqa": {"slots": {"photo": "image", "question": "text", "answer": "text"}, "outputs": ["answer"]},
    "both": {"slots": {"text": "text", "a": "text", "b": "text"}, "outputs": ["a", "b"]},
    "paint": {"slots": {"caption": "text", "picture": "image"}, "outputs": ["picture"]},
    "vector": {"slots": {"text": "text", "vector": "vector"}, "outputs": ["vector"]},
}


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(image: str, number: int) -> dict[str, Any]:
    """A candidate as a server tells it."""
    return {
        "image": image, "number": number, "codes": [0, 3, 1, 2], "estimates": {"relevance": 0.5},
        "score": 0.25 * number,
    }  # fmt: skip


class Scripted:
    """Refuses so many times, then answers by task."""

    def __init__(self, refusals: int = 0, status: int = 429):
        self.refusals, self.status, self.patience = refusals, status, "0"
        self.error: dict[str, Any] = {}
        self.delay = 0.0
        self.seen: list[tuple[str, str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # the head and the body of an answer are written apart

            def do_GET(self) -> None:
                name = self.path.partition("?")[0].rpartition("/")[2]
                if name == "models":
                    self.answer(200, {"data": [{"id": "m6"}]})
                elif name == "tasks":
                    self.answer(200, {"data": [{"name": name} for name in TASKS]})
                elif name in TASKS:
                    self.answer(200, TASKS[name])
                else:
                    self.answer(404, {"error": {"message": f"no task {name}"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                script.seen.append((self.path, self.headers.get("authorization", ""), body))
                time.sleep(script.delay)
                if script.refusals:
                    script.refusals -= 1
                    error = {"message": "too many", **script.error}
                    self.answer(script.status, {"error": error}, {"Retry-After": script.patience})
                    return
                image = base64.b64encode(png()).decode()
                outputs = {
                    "vqa": {"answer": "红色"}, "both": {"a": "一", "b": "二"}, "vector": {"vector": [0.6, 0.8]},
                    "paint": {"picture": image, "candidates": [drawn(image, number) for number in (1, 0)]},
                }[self.path.rpartition("/")[2]]  # fmt: skip
                if body.get("stream"):
                    events = [{"piece": "红"}, {"piece": "色"}, {"outputs": outputs}]
                    if body["inputs"]["question"] == "error":
                        events = [{"piece": "红"}, {"error": {"message": "it broke"}}]
                    content = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                    return
                self.answer(200, {"outputs": outputs})

            def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    one = Scripted()
    yield one
    one.server.shutdown()


class Asking:
    """One of the two clients, used from a test that is not a coroutine."""

    def __init__(self, kind: str, url: str, key: str | None = None, **options: Any):
        self.loop = asyncio.new_event_loop() if kind == "async" else None
        self.client: Any = AsyncClient(url, key, **options) if self.loop else Client(url, key, **options)

    def __getattr__(self, name: str) -> Any:
        """A method whose result is there: awaited, or listed where it is an iterator."""

        def call(*args: Any, **more: Any) -> Any:
            found = getattr(self.client, name)(*args, **more)
            if self.loop is None:
                return list(found) if isinstance(found, Iterator) else found
            return self.loop.run_until_complete(_listed(found) if isinstance(found, AsyncIterator) else found)

        return call


async def _listed(items: AsyncIterator[Any]) -> list[Any]:
    return [one async for one in items]


@pytest.fixture(params=["sync", "async"])
def asking(request: pytest.FixtureRequest) -> Iterator[Callable[..., Asking]]:
    """Makes clients of one of the two kinds."""
    made: list[Asking] = []

    def make(*args: Any, **options: Any) -> Asking:
        made.append(Asking(request.param, *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
        if one.loop:
            one.loop.close()


Make = Callable[..., Asking]


@pytest.mark.slow
def test_answers_are_as_a_local_model_gives_them(scripted: Scripted, asking: Make, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    m6 = asking(scripted.url, "m6-secret", model="m6")
    for photo in (str(tmp_path / "a.png"), png(), Image.open(tmp_path / "a.png")):
        assert m6.run("vqa", photo=photo, question="什么颜色?", decoding={"temperature": 0.5}) == "红色"
    assert m6.run("both", text="x") == {"a": "一", "b": "二"}
    np.testing.assert_allclose(m6.run("vector", text="x"), [0.6, 0.8], rtol=1e-6)
    assert m6.run("paint", caption="x").getpixel((0, 0)) == (255, 0, 0)
    best, other = m6.draw("paint", candidates=2, caption="x")
    assert type(best) is Candidate and (best.number, best.score, other.number) == (1, 0.25, 0)
    assert best.estimates == {"relevance": 0.5} and best.image.size == (4, 4)
    assert best.codes.dtype == np.int64 and best.codes.tolist() == [0, 3, 1, 2]
    assert m6.run_many("vqa", ({"photo": png(), "question": str(n)} for n in range(40))) == ["红色"] * 40
    assert m6.stream("vqa", photo=png(), question="?") == ["红", "色"]
    assert [one["id"] for one in m6.models()] == ["m6"] and len(m6.tasks()) == len(TASKS)
    path, key, body = scripted.seen[0]
    assert (path, key) == ("/v1/tasks/vqa", "Bearer m6-secret")
    assert body["model"] == "m6" and body["decoding"] == {"temperature": 0.5}
    assert base64.b64decode(body["inputs"]["photo"]) == png()


def test_examples_and_options_are_sent(scripted: Scripted, asking: Make) -> None:
    m6 = asking(scripted.url, allow_untrained=True)
    m6.run("vqa", photo=png(), question="?", examples=[{"photo": png(), "answer": "蓝"}], truncate="start", adapter="a")
    [(_, _, body)] = scripted.seen
    assert base64.b64decode(body["examples"][0]["photo"]) == png() and body["examples"][0]["answer"] == "蓝"
    assert (body["truncate"], body["adapter"], body["allow_untrained"]) == ("start", "a", True)
    assert "decoding" not in body and "model" not in body


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_is_refused_is_asked_again(
    status: int, scripted: Scripted, asking: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm6.client.FIRST_WAIT", 0.01)
    scripted.refusals, scripted.status = 2, status
    m6 = asking(scripted.url, retries=3)
    assert m6.run("both", text="x") == {"a": "一", "b": "二"}
    scripted.refusals = 2
    assert m6.stream("vqa", photo=png(), question="?") == ["红", "色"]
    scripted.refusals = 9
    with pytest.raises(ServerError, match="too many"):
        asking(scripted.url, retries=1).run("both", text="x")
    assert len(scripted.seen) == 3 + 3 + 2


@pytest.mark.slow
def test_retry_after_is_waited_for(scripted: Scripted, asking: Make) -> None:
    scripted.refusals, scripted.patience, started = 1, "1.2", time.monotonic()
    assert asking(scripted.url).run("both", text="x") == {"a": "一", "b": "二"}
    assert time.monotonic() - started >= 1.2


def test_a_refusal_for_long_is_told_at_once(scripted: Scripted, asking: Make) -> None:
    """A key that has spent its day is not sent again and again."""
    scripted.refusals, scripted.status, scripted.patience = 9, 429, "3600"
    for act in ("run", "stream"):
        with pytest.raises(ServerError):
            getattr(asking(scripted.url), act)("vqa", photo=png(), question="什么颜色?")
    assert len(scripted.seen) == 2


def test_mistakes_are_told(scripted: Scripted, asking: Make, tmp_path: Path) -> None:
    m6 = asking(scripted.url)
    with pytest.raises(UsageError, match="no task nothing"):
        m6.run("nothing")
    with pytest.raises(UsageError, match="is not a name"):
        m6.run("../vqa")
    with pytest.raises(UsageError, match="does not exist"):
        m6.run("vqa", photo=str(tmp_path / "none.png"), question="?")
    with pytest.raises(ServerError, match="it broke"):
        m6.stream("vqa", photo=png(), question="error")


def test_the_class_of_an_error_depends_on_its_type_and_code(scripted: Scripted, asking: Make) -> None:
    for status, error, kind in (
        (400, {"type": "invalid_request_error", "code": "invalid", "param": "text"}, UsageError),
        (400, {"type": "invalid_request_error", "code": "context_length_exceeded"}, ContextLengthError),
        (500, {"type": "server_error", "code": "internal"}, ServerError),
        (500, {}, ServerError), (413, {}, UsageError),  # of another server in between
    ):  # fmt: skip
        scripted.refusals, scripted.status, scripted.error = 1, status, error
        with pytest.raises(kind) as raised:
            asking(scripted.url).run("both", text="x")
        assert type(raised.value) is kind and raised.value.param == error.get("param")
        assert raised.value.code == error.get("code", kind.code)


@pytest.mark.parametrize("act", ["run", "stream"])
def test_a_server_that_is_not_there_or_too_slow_is_named(act: str, scripted: Scripted, asking: Make) -> None:
    with pytest.raises(ServerError, match="is `openm6 serve` running there"):
        getattr(asking("http://127.0.0.1:9", retries=0), act)("vqa", photo=png(), question="?")
    scripted.delay = 1.0
    with pytest.raises(ServerError, match="ReadTimeout"):
        getattr(asking(scripted.url, timeout=0.2, retries=0), act)("vqa", photo=png(), question="?")

"""The clients against a server whose answers the test writes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm6 import AsyncClient, Candidate, Client, UsageError
from openm6.client import ServerError

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
        self.seen: list[tuple[str, str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

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
                if script.refusals:
                    script.refusals -= 1
                    self.answer(script.status, {"error": {"message": "too many"}}, {"Retry-After": script.patience})
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    one = Scripted()
    yield one
    one.server.shutdown()


def test_answers_are_as_a_local_model_gives_them(scripted: Scripted, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with Client(scripted.url, "m6-secret", model="m6") as m6:
        for photo in (str(tmp_path / "a.png"), png(), Image.open(tmp_path / "a.png")):
            assert m6.run("vqa", photo=photo, question="什么颜色?", decoding={"temperature": 0.5}) == "红色"
        assert m6.run("both", text="x") == {"a": "一", "b": "二"}
        np.testing.assert_allclose(m6.run("vector", text="x"), [0.6, 0.8], rtol=1e-6)
        assert m6.run("paint", caption="x").getpixel((0, 0)) == (255, 0, 0)
        best, other = m6.draw("paint", candidates=2, caption="x")
        assert type(best) is Candidate and (best.number, best.score, other.number) == (1, 0.25, 0)
        assert best.estimates == {"relevance": 0.5} and best.image.size == (4, 4)
        assert best.codes.dtype == np.int64 and best.codes.tolist() == [0, 3, 1, 2]
        assert list(m6.run_many("vqa", ({"photo": png(), "question": str(n)} for n in range(40)))) == ["红色"] * 40
        assert list(m6.stream("vqa", photo=png(), question="?")) == ["红", "色"]
        assert [one["id"] for one in m6.models()] == ["m6"] and len(m6.tasks()) == len(TASKS)
    path, key, body = scripted.seen[0]
    assert (path, key) == ("/v1/tasks/vqa", "Bearer m6-secret")
    assert body["model"] == "m6" and body["decoding"] == {"temperature": 0.5}
    assert base64.b64decode(body["inputs"]["photo"]) == png()


def test_asyncio_has_the_same(scripted: Scripted) -> None:
    async def run() -> None:
        async with AsyncClient(scripted.url) as m6:
            assert await m6.run("vqa", photo=png(), question="?") == "红色"
            assert [one async for one in m6.run_many("both", [{"text": "x"}] * 9)] == [{"a": "一", "b": "二"}] * 9
            assert [piece async for piece in m6.stream("vqa", photo=png(), question="?")] == ["红", "色"]
            assert [type(one) for one in await m6.draw("paint", candidates=2, caption="x")] == [Candidate] * 2
            assert (await m6.models())[0]["id"] == "m6" and len(await m6.tasks()) == len(TASKS)

    asyncio.run(run())


@pytest.mark.parametrize("status", [429, 503])
def test_what_is_refused_is_asked_again(status: int) -> None:
    scripted = Scripted(2, status)
    assert Client(scripted.url).run("both", text="x") == {"a": "一", "b": "二"}
    scripted.refusals = 2
    assert list(Client(scripted.url).stream("vqa", photo=png(), question="?")) == ["红", "色"]
    scripted.refusals = 9
    with pytest.raises(ServerError, match="too many"):
        Client(scripted.url, retries=1).run("both", text="x")
    assert len(scripted.seen) == 3 + 3 + 2
    scripted.server.shutdown()


def test_mistakes_are_told(scripted: Scripted, tmp_path: Path) -> None:
    with Client(scripted.url) as m6:
        with pytest.raises(UsageError, match="no task nothing"):
            m6.run("nothing")
        with pytest.raises(UsageError, match="by their names"):
            m6.run("../vqa")
        with pytest.raises(UsageError, match="does not exist"):
            m6.run("vqa", photo=str(tmp_path / "none.png"), question="?")
        with pytest.raises(ServerError, match="it broke"):
            list(m6.stream("vqa", photo=png(), question="error"))
    with pytest.raises(ServerError, match="is `openm6 serve` running there"):
        Client("http://127.0.0.1:9", retries=0).run("vqa", photo=png(), question="?")


def test_a_refusal_for_long_is_told_at_once(scripted: Scripted) -> None:
    """A key that has spent its day is not sent again and again."""
    scripted.refusals, scripted.status, scripted.patience = 9, 429, "3600"
    with Client(scripted.url) as m6, pytest.raises(ServerError):
        m6.run("vqa", photo=png(), question="什么颜色?")
    assert len(scripted.seen) == 1

"""What has gone wrong in other servers, and must not here: each hole a test."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

import openm6
from openm6.core.errors import DataError
from openm6.core.images import open_image
from openm6.serve import guard, incoming
from openm6.serve.guard import BodyError, Guard, sse
from openm6.serve.incoming import Pictures, record_of
from openm6.serve.wire import kind_of, told_of

ROOT = Path(openm6.__file__).parent


class Site:
    """A web site on the loopback address, of which tests say what its name stands for."""

    def __init__(self) -> None:
        self.redirect = ""
        self.seen: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append(self.headers["host"])
                if site.redirect:
                    self.send_response(302)
                    self.send_header("Location", site.redirect)
                    self.end_headers()
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"picture")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.server.shutdown()


def names(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
    """A name server: each name has these addresses, one after the other at each question."""
    asked: dict[str, int] = {}

    def found(host: str, port: int, **_: Any) -> list[Any]:
        number = asked[host] = asked.get(host, -1) + 1
        addresses = known[host][min(number, len(known[host]) - 1)]
        return [(2, 1, 6, "", (address, port)) for address in addresses.split()]

    monkeypatch.setattr(incoming.socket, "getaddrinfo", found)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://localhost/a.png", "https://evil.example/a.png", "http://[::1]/a.png",
        "http://shop.example@evil.example/a.png", "http://evil.example\\@shop.example/a.png",
        "http://shop.example.evil.example/a.png", "HTTP://169.254.169.254/latest/meta-data", "http://shop.example%00/",
    ],
)  # fmt: skip
def test_pictures_come_from_no_host_that_is_not_listed(url: str) -> None:
    for pictures in (Pictures(), Pictures(["shop.example"])):
        with pytest.raises(DataError, match="not fetched from there"):
            pictures.read(url)


@pytest.mark.parametrize(
    "scheme", ["file:///etc/passwd", "ftp://shop.example/a", "/etc/passwd", "gopher://x", "../a.png"]
)
def test_no_other_scheme_and_no_path_is_read(scheme: str) -> None:
    with pytest.raises(DataError):
        Pictures(["shop.example"]).read(scheme)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.5", "192.168.1.1", "172.16.0.1", "169.254.169.254", "::1", "fd00::1", "fe80::1%eth0",
     "0.0.0.0", "100.64.0.1", "::ffff:127.0.0.1", "93.184.216.34 10.0.0.5"],
)  # fmt: skip
def test_a_listed_host_that_stands_for_a_private_address_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    names(monkeypatch, {"shop.example": [address]})
    with pytest.raises(DataError, match="not fetched from there"):
        Pictures(["shop.example"]).read("http://shop.example/a.png")


def test_what_is_connected_to_is_what_was_checked(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """A name that has a public address when it is checked and another one afterwards is asked for once alone."""
    names(monkeypatch, {"shop.example": ["93.184.216.34", "127.0.0.1"]})
    connected: list[str] = []

    def connect(address: tuple[str, int], *_: Any, **__: Any) -> Any:
        connected.append(address[0])
        raise OSError("no network here")

    monkeypatch.setattr("socket.create_connection", connect)
    with pytest.raises(DataError, match="cannot be fetched"):
        Pictures(["shop.example"]).read(f"http://shop.example:{site.port}/a.png")
    assert connected == ["93.184.216.34"] and not site.seen


def test_a_redirect_is_checked_like_the_first_address(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    monkeypatch.setattr(incoming, "_public", lambda host, port: "127.0.0.1")  # the site stands for a public one
    pictures = Pictures(["shop.example"])
    assert pictures.read(f"http://shop.example:{site.port}/a.png") == b"picture"
    assert site.seen == [f"shop.example:{site.port}"]
    for target in (f"http://127.0.0.1:{site.port}/", "http://evil.example/", "file:///etc/passwd"):
        site.redirect = target
        with pytest.raises(DataError, match="not fetched from there"):
            pictures.read(f"http://shop.example:{site.port}/a.png")
    site.redirect = f"http://shop.example:{site.port}/again"
    with pytest.raises(DataError, match="on and on"):
        pictures.read(f"http://shop.example:{site.port}/a.png")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header() -> None:
    for width, height in ((50_000, 50_000), (200_000, 1_000)):
        with pytest.raises(DataError, match="million"):
            open_image(bomb(width, height))


def test_of_thousands_of_frames_one_is_decoded() -> None:
    frames = [Image.new("P", (64, 64), colour % 256) for colour in range(2000)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert open_image(buffer.getvalue()).size == (64, 64)


def test_a_picture_in_a_request_has_a_size_at_most() -> None:
    with pytest.raises(DataError, match="MiB"):
        Pictures().read("A" * (45 * 2**20))


def test_errors_of_libraries_are_not_told() -> None:
    for error in (ValueError("at 0x7f12345678 in /home/anna/model"), RuntimeError("secret"), KeyError("/etc")):
        assert kind_of(error) == "internal"
        assert not re.search("0x|/|secret", told_of(error))
    try:
        open_image(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    except DataError as error:
        assert "0x" not in str(error) and "site-packages" not in str(error)


def test_a_text_in_the_place_of_a_picture_is_no_path() -> None:
    with pytest.raises(DataError, match="photo: .*base64"):
        record_of({"photo": "/etc/passwd"}, {"photo": "image"}, Pictures())
    data = base64.b64encode(b"abc").decode()
    for value in (data, f"data:image/png;base64,{data}", {"url": f"data:image/png;base64,{data}"}):
        assert Pictures().quick(value)
        assert record_of({"photo": value}, {"photo": "image"}, Pictures()) == {"photo": b"abc"}
    with pytest.raises(DataError, match="neither"):
        Pictures().read(f"../data:image/png;base64,{data}")
    assert not Pictures().quick({"url": "https://shop.example/a.png"})  # fetched in a thread of its own


def test_nothing_is_unpickled() -> None:
    """Of a user's files none: neither by name in our code, nor by a loader that would."""
    wrong = re.compile(
        r"\bpickle\.loads?\(|\bimport pickle\b|torch\.load\(|joblib\.load|np\.load\(.*allow_pickle=True|yaml\.load\("
    )
    for path in ROOT.rglob("*.py"):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            assert not wrong.search(line), f"{path}:{number}: {line.strip()}"


@pytest.mark.parametrize(
    ("headers", "loopback", "status"),
    [
        ({}, True, 200), ({"origin": "http://127.0.0.1:8080"}, True, 200), ({"host": "localhost:8080"}, True, 200),
        ({"host": "evil.example"}, True, 403), ({"host": "127.0.0.1.evil.example"}, True, 403),
        ({"host": "evil@127.0.0.1.evil.example"}, True, 403), ({"host": ""}, True, 403),
        ({"origin": "http://evil.example"}, True, 403), ({"origin": "null"}, True, 403),
        ({"origin": "http://127.0.0.1:8081"}, True, 403),
        ({"host": "m6.example", "origin": "https://other.example"}, False, 200),  # a proxy may rename it
        ({"sec-fetch-site": "same-origin"}, False, 200), ({"sec-fetch-site": "none"}, False, 200),
        ({"sec-fetch-site": "cross-site"}, False, 403), ({"sec-fetch-site": "same-site"}, False, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False, 403),
    ],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(headers: dict[str, str], loopback: bool, status: int) -> None:
    """Nor may a name of theirs that stands for this machine (DNS rebinding)."""
    app = FastAPI()
    app.add_middleware(Guard, most=1000, full=lambda: False, loopback=loopback)
    app.get("/")(lambda: "ok")
    app.post("/")(lambda: "ok")
    client = TestClient(app, base_url="http://127.0.0.1:8080")
    assert client.get("/", headers=headers).status_code == status
    posted = 403 if headers.get("sec-fetch-mode") == "navigate" else status
    assert client.post("/", headers=headers).status_code == posted


def test_a_body_comes_as_others_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose time is over are counted until each has had its turn."""
    monkeypatch.setattr(guard, "OPEN", 3)

    async def run() -> Any:
        one = Guard(None, 1000, full=lambda: False, seconds=0.01)

        def part(receive: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(one._part(guard._Body({b"content-length": b"1"}, 1000), "/", receive))

        async def here() -> Any:
            return {"type": "http.request", "body": b"a"}

        stalled = [part(asyncio.Event().wait) for _ in range(3)]
        await asyncio.sleep(0)
        time.sleep(0.05)
        await asyncio.sleep(0)  # now their time is over, but none of them has heard of it
        last = part(here)
        assert all(isinstance(end, BodyError) for end in await asyncio.gather(*stalled, return_exceptions=True))
        return await last

    assert asyncio.run(run())["body"] == b"a"


def test_an_event_stays_on_its_line_whatever_its_text_holds() -> None:
    """Clients that read lines as Python does end them at characters that JSON leaves in a text."""
    pieces = ["一\u2028二", "\x85", "\n", "\u2029"]

    async def body() -> str:
        async def events() -> AsyncIterator[dict[str, Any]]:
            for piece in pieces:
                yield {"piece": piece}

        return "".join([str(part) async for part in (await sse(events())).body_iterator])

    lines = [line for line in asyncio.run(body()).splitlines() if line]
    assert [json.loads(line.removeprefix("data: "))["piece"] for line in lines] == pieces

"""What has gone wrong in other servers, and must not here: each hole a test."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import ssl
import struct
import subprocess
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
from openm6.core.errors import DataError, ErrorKind
from openm6.core.images import MAX_BYTES, open_image
from openm6.serve import incoming
from openm6.serve.guard import Guard, sse
from openm6.serve.incoming import Pictures, record_of
from openm6.serve.wire import reported

ROOT = Path(openm6.__file__).parent


class Site:
    """A web site on the loopback address, of which tests say what its name stands for."""

    def __init__(self) -> None:
        self.redirect, self.slow, self.content = "", "", b"picture"
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
                with contextlib.suppress(OSError):  # the client may have gone
                    if site.slow == "head":
                        self.drip(b"X-Slow: " + b"x" * 100)
                    self.end_headers()
                    if site.slow == "body":
                        self.drip(bytes(100))
                    self.wfile.write(site.content)

            def drip(self, content: bytes) -> None:
                self.flush_headers()
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


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
    with pytest.raises(DataError, match="cannot be fetched"):  # that address does not answer here
        Pictures(["shop.example"], seconds=0.3).read(f"http://shop.example:{site.port}/a.png")
    assert not site.seen


def public_here(host: str, port: int) -> str:
    """The site of a test stands for a host with a public address."""
    return "127.0.0.1"


def test_the_host_is_told_its_name_and_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert Pictures(["shop.example"], address_of=public_here).read(f"http://SHOP.example:{site.port}/") == b"picture"
    assert site.seen == [f"shop.example:{site.port}"]


@pytest.mark.parametrize("slow", ["head", "body"])
def test_a_host_that_sends_slowly_is_given_up(slow: str, site: Site) -> None:
    """Though something of the answer comes all the time."""
    site.slow, started = slow, time.monotonic()
    with pytest.raises(DataError, match="cannot be fetched"):
        Pictures(["shop.example"], 0.5, public_here).read(f"http://shop.example:{site.port}/a.png")
    assert time.monotonic() - started < 3


def test_a_file_that_is_too_large_is_not_read_to_its_end(site: Site) -> None:
    site.content = bytes(MAX_BYTES + 1)
    with pytest.raises(DataError, match="more than 32 MiB"):
        Pictures(["shop.example"], address_of=public_here).read(f"http://shop.example:{site.port}/a.png")


def test_over_tls_the_certificate_has_to_be_of_the_name(site: Site, tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
         "-days", "2", "-subj", "/CN=shop.example", "-addext", "subjectAltName=DNS:shop.example"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    asked: list[str | None] = []
    tls.sni_callback = lambda _, name, __: asked.append(name)
    site.server.socket = tls.wrap_socket(site.server.socket, server_side=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        pictures = Pictures(["shop.example", "other.example"], address_of=public_here)
        assert pictures.read(f"https://shop.example:{site.port}/") == b"picture"
        with pytest.raises(DataError, match="cannot be fetched"):
            pictures.read(f"https://other.example:{site.port}/")
    assert asked == ["shop.example", "other.example"]


def test_a_redirect_is_checked_like_the_first_address(site: Site) -> None:
    pictures = Pictures(["shop.example"], address_of=public_here)
    assert pictures.read(f"http://shop.example:{site.port}/a.png") == b"picture"
    assert site.seen == [f"shop.example:{site.port}"]
    for target in (f"http://127.0.0.1:{site.port}/", "http://evil.example/", "file:///etc/passwd"):
        site.redirect = target
        with pytest.raises(DataError, match="not fetched from there"):
            pictures.read(f"http://shop.example:{site.port}/a.png")
    site.redirect = f"http://shop.example:{site.port}/again"
    with pytest.raises(DataError, match="redirects more than 3 times"):
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
        assert reported(error).kind is ErrorKind.INTERNAL
        assert not re.search("0x|/|secret", str(reported(error)))
    try:
        open_image(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    except DataError as error:
        assert "0x" not in str(error) and "site-packages" not in str(error)


def test_a_text_in_the_place_of_a_picture_is_no_path() -> None:
    with pytest.raises(DataError, match="photo: .*base64"):
        record_of({"photo": "/etc/passwd"}, {"photo": "image"}, Pictures())
    data = base64.b64encode(b"abc").decode()
    for value in (data, f"data:image/png;base64,{data}", {"url": f"data:image/png;base64,{data}"}):
        assert Pictures().is_quick(value)
        assert record_of({"photo": value}, {"photo": "image"}, Pictures()) == {"photo": b"abc"}
    with pytest.raises(DataError, match="neither"):
        Pictures().read(f"../data:image/png;base64,{data}")
    assert not Pictures().is_quick({"url": "https://shop.example/a.png"})  # fetched in a thread of its own


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


def test_a_body_comes_as_others_are_given_up() -> None:
    """Those whose time is over are counted until each has had its turn."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def run() -> None:
        one = Guard(echo, 1000, full=lambda: False, seconds=0.01, most_open=3)

        async def ask(receive: Any) -> tuple[int, bytes]:
            sent: list[dict[str, Any]] = []

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            headers = [(b"content-length", b"1")]
            await one({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, send)
            return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

        async def here() -> Any:
            return {"type": "http.request", "body": b"a"}

        stalled = [asyncio.create_task(ask(asyncio.Event().wait)) for _ in range(3)]
        await asyncio.sleep(0)
        time.sleep(0.05)
        await asyncio.sleep(0)  # now their time is over, but none of them has heard of it
        assert await ask(here) == (200, b"a")
        assert {status for status, _ in await asyncio.gather(*stalled)} == {408}

    asyncio.run(run())


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

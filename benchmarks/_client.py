"""A client that costs little, for measuring a server on the machine that the client is on too: requests over
connections that stay open, and of an answer its status, its first bytes and its end."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.I)


class Client:
    """A pool of connections: idle ones are reused, others opened as needed."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._free: list[_Connection] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._free:
            one.transport.close()

    async def ask(self, path: str, body: bytes) -> tuple[float, float] | None:
        """Seconds to the first bytes of the answer's body and to its end; None where the server refused."""
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        sent = time.perf_counter()
        while self._free:  # the server does not keep what is idle for long, and may close it just when it is asked
            connection = self._free.pop()
            with suppress(ConnectionError):
                status, first, end = await connection.send(request)
                break
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
            status, first, end = await connection.send(request)
        self._free.append(connection)
        return (first - sent, end - sent) if status == 200 else None


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._clear()

    def _clear(self) -> None:
        self._read, self._head, self._first = bytearray(), -1, 0.0
        self._length: int | None = None
        self._done: asyncio.Future[tuple[int, float, float]] | None = None

    def send(self, request: bytes) -> asyncio.Future[tuple[int, float, float]]:
        """Its status, and when the first bytes of its body and its last ones came."""
        self._done = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            self.connection_lost(None)
            return self._done
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        read = self._read
        read += data
        if self._head < 0:
            self._head = read.find(b"\r\n\r\n")
            if self._head < 0:
                return
            head = bytes(read[: self._head])
            length = _LENGTH.search(head)
            self._length = int(length[1]) if length else None
            if length is None and not _CHUNKED.search(head):
                raise ValueError(f"neither a length nor chunks: {head!r}")
        body = len(read) - self._head - 4
        self._first = self._first or (time.perf_counter() if body else 0.0)
        if (body >= self._length) if self._length is not None else read.endswith(b"\r\n0\r\n\r\n"):
            self._end(int(read[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))

    def _end(self, status: int) -> None:
        done, first = self._done, self._first
        self._clear()
        if done and not done.done():
            done.set_result((status, first, time.perf_counter()))

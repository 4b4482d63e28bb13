"""The server's sockets, bound before a model is loaded, and connections that are closed when idle."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import socket
import time
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from openm6.core.errors import UsageError
from openm6.serve.guard import body_of

HEAD = 15.0
"""Seconds from the opening of a connection, or its last answer, to the end of the next request's head."""

BEHIND = 0.25
"""Seconds above which a lag is long: a busy server then refuses new requests before it reads them."""
LOOK = 0.05
"""Seconds between two measurements of the lag of the event loop."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, closed where a request's head is late. Invalid HTTP is answered in the API's JSON."""

    seconds = HEAD
    _timer: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.seconds, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        if (
            self.cycle is None or self.cycle.response_complete
        ):  # the next request may have arrived before the last answer
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        error = UsageError("This is not a valid request of HTTP/1.1.", code="invalid_http")
        content = json.dumps(body_of(error)).encode()
        head = b"content-type: application/json\r\nconnection: close\r\n"
        self.transport.write(STATUS_LINE[400] + head + b"content-length: %d\r\n\r\n" % len(content) + content)
        self.transport.close()


class Lag:
    """The lag of the event loop: how much later than scheduled it wakes a task."""

    def __init__(self) -> None:
        self._due, self._last = math.inf, 0.0

    async def follow(self) -> None:
        """Measure the lag, again and again, until the task is cancelled."""
        while True:
            self._due = time.monotonic() + LOOK
            await asyncio.sleep(LOOK)
            self._last = time.monotonic() - self._due

    @property
    def is_long(self) -> bool:
        """Whether the last measured lag, or the one under way, exceeds BEHIND."""
        return max(self._last, time.monotonic() - self._due) > BEHIND


def bind(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for all addresses of a host, not listening yet. Raises UsageError where that fails."""
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            one = socket.socket(family, kind, protocol)
            found.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            port = one.getsockname()[1]  # port 0 means any port; all addresses get the same one
    except OSError as error:
        for one in found:
            one.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"Port {port} of {host} is taken: stop what listens there, or give another --port."
            ) from None
        raise UsageError(f"{host} cannot listen on port {port} ({error.strerror}): see --host and --port.") from None
    return found

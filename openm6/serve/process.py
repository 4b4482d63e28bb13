"""The server's side of a model's process (worker.py): its start, requests, death and end."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.serve.pending import Heard, PendingRequest
from openm6.serve.settings import Settings
from openm6.serve.wire import Messages, error_of, packed

if TYPE_CHECKING:
    from openm6.serve.settings import Place

STARTING = 300.0
"""Maximum number of seconds to load a model."""


class Worker:
    """A process. `on_end` is called when a request has ended, `on_death` when the process has."""

    def __init__(
        self,
        place: Place,
        process: subprocess.Popen[bytes],
        on_end: Callable[[], None],
        on_death: Callable[[Worker], None],
    ):
        self.place, self.process = place, process
        self.open: dict[str, PendingRequest] = {}
        self.unsettled: dict[str, Heard] = {}  # requests of which more may be heard, cancelled ones too
        self._on_end, self._on_death = on_end, on_death
        self._states: list[asyncio.Future[dict[str, Any]]] = []
        self.about: dict[str, Any] = {}
        self.alive = True
        self.leaving = False
        self.began = time.monotonic()
        self._first: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._connection: asyncio.WriteTransport

    @classmethod
    async def start(
        cls, place: Place, settings: Settings, on_end: Callable[[], None], on_death: Callable[[Worker], None]
    ) -> Worker:
        """Start a process. Raises UsageError where the model cannot be loaded; its message may name files of the
        server, and is not for clients."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "openm6.serve.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ,
            )  # fmt: skip
        worker = cls(place, process, on_end, on_death)
        worker._connection, _ = await asyncio.get_running_loop().create_connection(
            lambda: Messages(worker._hear, worker._end), sock=ours
        )
        adapters = {name: str(path) for name, path in place.adapters.items()}
        worker._send({"model": str(place.model), "adapters": adapters, "settings": asdict(settings)})
        first: dict[str, Any] = {}
        try:
            first = await asyncio.wait_for(worker._first, STARTING)
        except TimeoutError:
            first = {"fatal": f"it took more than {STARTING:.0f} seconds to load."}
        finally:
            if "ready" not in first or not worker.alive:
                process.kill()
                worker._connection.close()
                await asyncio.to_thread(process.wait)
        if not worker.alive or "ready" not in first:
            raise UsageError(first.get("fatal") or f"The process for {place.model} ended as it began.")
        worker.about, worker.began = first["ready"], time.monotonic()
        return worker

    def _hear(self, message: dict[str, Any]) -> None:
        identity = message.get("id", "")
        if (heard := self.unsettled.get(identity)) is not None:
            heard(message)
            if "value" in message or "error" in message:
                del self.unsettled[identity]
        if (request := self.open.get(identity)) is not None:
            request.events.put_nowait(message)
            if "value" in message or "error" in message:
                del self.open[request.identity]
                self._on_end()
        elif "state" in message:
            for future in self._states:
                if not future.done():
                    future.set_result(message["state"])
            self._states.clear()
        elif not self._first.done():
            self._first.set_result(message)

    def _end(self) -> None:
        """The connection was closed, as it is when the process dies."""
        self.alive = False
        if not self._first.done():
            self._first.set_result({})
        for heard in self.unsettled.values():
            heard(error_of(Refusal(ErrorKind.DIED, "The process that worked at this request ended.")))
        self.unsettled.clear()
        for future in self._states:
            if not future.done():
                future.set_result({})
        self._on_death(self)

    def ask(self, request: PendingRequest) -> None:
        """Send a request to the process, whose messages go to the request's queue."""
        self.open[request.identity] = request
        request.cancel = self.cancel
        try:
            self._send({"do": "ask", "id": request.identity, **request.message, "seconds": request.seconds})
            self.unsettled[request.identity] = request.heard
            request.heard({})
        except Exception as error:  # for a message that is too large
            del self.open[request.identity]
            request.fail(error)

    def cancel(self, request: PendingRequest) -> None:
        """Cancel a request whose client has left."""
        if self.open.pop(request.identity, None) is not None and self.alive:
            self._send({"do": "cancel", "id": request.identity})
            self._on_end()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._connection.write(packed(message))

    async def state(self) -> dict[str, Any]:
        """The state of the engine; empty where the process has ended."""
        if not self.alive:
            return {}
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._states.append(future)
        self._send({"do": "state"})
        return await future

    async def stop(self, seconds: float = 30.0) -> None:
        """Stop the process after its running requests, or after these seconds."""
        self.leaving = True
        until = time.monotonic() + seconds
        while self.alive and self.open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.alive:
            self._send({"do": "stop"})
            try:
                await asyncio.to_thread(self.process.wait, max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._connection.close()
        await asyncio.to_thread(self.process.wait)

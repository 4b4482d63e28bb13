"""The server's side of a model's process (worker.py): its start, requests, death and end; and the rule by which
requests that outlive it are sent again.

The death of a process does not reveal the request at fault, so that every open request becomes a suspect. Suspects are
sent to the next process a few at a time, beside new requests; a suspect whose process dies again is sent alone, and
fails if that process dies too. All others are answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, TypeAlias

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.serve.wire import Messages, Place, Settings, error_of, late, packed

STARTING = 300.0
"""Maximum number of seconds to load a model."""
SUSPECTS = 8
"""Maximum number of requests in a process that were open when another one died."""
ALONE = 2
"""Number of deaths after which a request is sent only to an idle process."""
REMEMBERED = 600.0
"""Seconds for which a request that ended its process, alone, is refused when it is sent again."""

Heard: TypeAlias = Callable[[Mapping[str, Any]], None]
"""A callback for every message about a request: an empty one as it is sent to a process, the last one even after the
client has left."""


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request from its admission to its end.

    message    the message to a process (work.EngineRequest.of)
    deadline   by time.monotonic(); inf: none
    heard      called with every message about it
    events     messages of the processes; {"again": True} where the next process starts over
    deaths     number of processes that died while it was open
    told       text that the client has received; `owed` its end that the next process has not repeated yet
    cancel     cancels it in the process that works at it, if any
    """

    identity: str
    message: Mapping[str, Any]
    heard: Heard = lambda _: None
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    deaths: int = 0
    told: str = ""
    owed: str = ""
    cancel: Callable[[PendingRequest], None] = lambda _: None
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.message.get("seconds", inf)

    @property
    def seconds(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    async def next_event(self) -> dict[str, Any]:
        """The next event that is new to the client; an error where a later process does not repeat the text that was
        sent already."""
        while True:
            event = await self.events.get()
            if "again" in event:
                self.owed = self.told
                continue
            piece, ended = event.get("piece", ""), "value" in event
            if self.owed and "error" not in event:
                known = min(len(piece), len(self.owed))
                if piece[:known] != self.owed[:known] or (ended and known < len(self.owed)):
                    message = "The model's process died, and the next one gives another answer."
                    return error_of(Refusal(ErrorKind.DIED, message, "answer_changed"))
                self.owed, piece = self.owed[known:], piece[known:]
                if not piece and not ended:
                    continue
                event = {**event, "piece": piece}
            self.told += piece
            return event

    def fail(self, error: Exception) -> None:
        self.events.put_nowait(error_of(error))


class PendingRequests:
    """The requests that wait for a process, and digests of those that are known to end one."""

    def __init__(self) -> None:
        self.waiting: list[PendingRequest] = []
        self._deadly: dict[bytes, float] = {}

    def add(self, request: PendingRequest) -> asyncio.TimerHandle:
        """Add a request that waits until its deadline. Returns a timer, to be cancelled when the request has ended."""
        self.waiting.append(request)
        return asyncio.get_running_loop().call_later(request.seconds, self._expire, request)

    def _expire(self, request: PendingRequest) -> None:
        if request in self.waiting:  # else the process watches the deadline
            self.waiting.remove(request)
            request.fail(late())

    def drop(self, request: PendingRequest) -> None:
        """Drop a request whose client has left."""
        if request in self.waiting:
            self.waiting.remove(request)
        request.cancel(request)

    def fail(self, error: Exception) -> None:
        """Fail every request that waits."""
        for request in self.waiting:
            request.fail(error)
        self.waiting.clear()

    def next(self, running: Collection[PendingRequest]) -> PendingRequest | None:
        """Remove and return the request to send to a process that works at `running`; None where none may be sent."""
        if not self.waiting:
            return None
        suspects = [request.deaths for request in running if request.deaths]
        if any(deaths >= ALONE for deaths in suspects):
            return None
        for request in sorted(self.waiting, key=lambda one: -one.deaths):
            if request.deaths >= ALONE and running:
                return None
            if not request.deaths or len(suspects) < SUSPECTS:
                self.waiting.remove(request)
                return request
        return None

    def survive(self, running: Collection[PendingRequest]) -> None:
        """Queue the requests of a process that died for the next one, except for a request that is at fault."""
        for request in running:
            request.deaths += 1
            if request.deaths >= ALONE and len(running) == 1:
                now = time.monotonic()
                self._deadly = {key: until for key, until in self._deadly.items() if until > now}
                self._deadly[_content(request.message)] = now + REMEMBERED
                request.fail(deadly(REMEMBERED))
            else:
                request.events.put_nowait({"again": True})
                self.waiting.append(request)

    def refused_for(self, message: Mapping[str, Any]) -> float:
        """Seconds for which this request is refused because it has ended its process recently; else 0."""
        if not self._deadly:
            return 0.0
        return max(0.0, self._deadly.get(_content(message), 0.0) - time.monotonic())


def deadly(seconds: float) -> Refusal:
    """The error of a request that ends its process, and is refused for so many seconds."""
    message = "The model's process ended each time that it worked at this request."
    return Refusal(ErrorKind.DIED, message, retry_after=seconds)


def _content(message: Mapping[str, Any]) -> bytes:
    """A digest of a request without its seed and its time limit."""
    decoding = {name: value for name, value in message.get("decoding", {}).items() if name != "seed"}
    content = {name: value for name, value in message.items() if name not in ("seconds", "pieces")}
    return hashlib.sha256(packed({**content, "decoding": decoding})).digest()


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

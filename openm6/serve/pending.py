"""Requests of a model that outlive their process, and the rule by which they are sent again.

The death of a process does not reveal the request at fault, so that every open request becomes a suspect. Suspects are
sent to the next process a few at a time, beside new requests; a suspect whose process dies again is sent alone, and
fails if that process dies too. All others are answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from openm6.core.errors import ErrorKind, Refusal
from openm6.serve.wire import error_of, packed

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

    message    the message to a process (work.Request)
    deadline   by time.monotonic()
    heard      called with every message about it
    events     messages of the processes; {"again": True} where the next process starts over
    deaths     number of processes that died while it was open
    told       text that the client has received; `owed` its end that the next process has not repeated yet
    cancel     cancels it in the process that works at it, if any
    """

    identity: str
    message: Mapping[str, Any]
    deadline: float
    heard: Heard = lambda _: None
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    deaths: int = 0
    told: str = ""
    owed: str = ""
    cancel: Callable[[PendingRequest], None] = lambda _: None

    @classmethod
    def of(cls, identity: str, message: Mapping[str, Any], heard: Heard = lambda _: None) -> PendingRequest:
        seconds = message.get("seconds")
        return cls(identity, message, float("inf") if seconds is None else time.monotonic() + seconds, heard)

    @property
    def seconds(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())

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

    def add(self, request: PendingRequest) -> asyncio.TimerHandle | None:
        """Add a request that waits until its deadline. Returns a timer, to be cancelled when the request has ended."""
        self.waiting.append(request)
        if (seconds := request.seconds) is None:
            return None
        return asyncio.get_running_loop().call_later(seconds, self._expire, request)

    def _expire(self, request: PendingRequest) -> None:
        if request in self.waiting:  # else the process watches the deadline
            self.waiting.remove(request)
            request.fail(Refusal(ErrorKind.DEADLINE, "The request's deadline has passed."))

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

"""Requests of one model that outlive the process they were sent to, and the rule by which they are sent again.

A process that dies says nothing of the request that was at fault. So every request that was open then is a suspect.
Suspects are sent to the next process a few at a time, beside new requests; a suspect whose process dies again is sent
alone, and fails if its process dies once more. All others are answered.
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
"""Number of deaths after which a request is sent only to a process that has nothing else to do."""
REMEMBERED = 600.0
"""Seconds for which a request that ended its process, alone, is refused when somebody sends the same again."""

Heard: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Is called with every message about a request: with an empty one as it is asked of a process, with the last one also
after its asker has gone."""


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request from its admission to its end.

    message    what the process is told (work.Request)
    deadline   by time.monotonic()
    heard      is called with every message about it
    events     what the processes tell of it; {"again": True} where the next one begins anew
    deaths     number of processes that died while it was open
    told       what the client has of its text; `owed` the end of it that the next process has not written again yet
    cancel     tells the process that works at it, if any, that nobody waits for it
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
        """Seconds that are left of its time; None where it has any."""
        return None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())

    async def next_event(self) -> dict[str, Any]:
        """The next event that is new to the client; an error where a further process writes another text than the one
        that was begun."""
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
    """The requests that wait for a process, and those that are known to end one."""

    def __init__(self) -> None:
        self.waiting: list[PendingRequest] = []
        self._deadly: dict[bytes, float] = {}

    def add(self, request: PendingRequest) -> asyncio.TimerHandle | None:
        """Let it wait until its deadline; a timer that the caller cancels when the request has ended."""
        self.waiting.append(request)
        if (seconds := request.seconds) is None:
            return None
        return asyncio.get_running_loop().call_later(seconds, self._expire, request)

    def _expire(self, request: PendingRequest) -> None:
        if request in self.waiting:  # else the process looks at the time
            self.waiting.remove(request)
            request.fail(Refusal(ErrorKind.DEADLINE, "The request's deadline has passed."))

    def drop(self, request: PendingRequest) -> None:
        """Forget a request that nobody waits for any more."""
        if request in self.waiting:
            self.waiting.remove(request)
        request.cancel(request)

    def fail(self, error: Exception) -> None:
        """Fail every request that waits."""
        for request in self.waiting:
            request.fail(error)
        self.waiting.clear()

    def next(self, running: Collection[PendingRequest]) -> PendingRequest | None:
        """The request to send to a process that works at `running`; it waits no more. None where none may be sent."""
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
        """Let the requests that a process worked at when it died wait for the next one, but the one at fault."""
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
        """Seconds for which this is refused, because the same request has ended its process lately; else 0."""
        if not self._deadly:
            return 0.0
        return max(0.0, self._deadly.get(_content(message), 0.0) - time.monotonic())


def deadly(seconds: float) -> Refusal:
    """The error of a request that ends its process, and is refused for so many seconds."""
    message = "The model's process ended each time that it worked at this request."
    return Refusal(ErrorKind.DIED, message, retry_after=seconds)


def _content(message: Mapping[str, Any]) -> bytes:
    """A digest of what is asked, whatever its seed and its time."""
    decoding = {name: value for name, value in message.get("decoding", {}).items() if name != "seed"}
    content = {name: value for name, value in message.items() if name not in ("seconds", "pieces")}
    return hashlib.sha256(packed({**content, "decoding": decoding})).digest()

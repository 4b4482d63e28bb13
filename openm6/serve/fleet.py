"""Models behind names, each in a process of its own: started, asked, restarted when it dies, exchanged for another.

A process that dies is started again at once, and later each time that it does not live for long. What was asked of it
is asked again of the next one (pending.py). A text that was begun goes on only where the next process begins it with
the same words.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from openm6.core.errors import ErrorKind, Refusal, UsageError, cut, suggest
from openm6.serve.pending import Heard, PendingRequest, PendingRequests, deadly
from openm6.serve.process import Worker
from openm6.serve.settings import Place, Settings
from openm6.serve.wire import refusal_of

log = logging.getLogger("openm6.serve")

QUEUE = 256
"""Requests that a process has at most, those it works at and those that wait; further ones are refused."""
HEALTHY = 60.0
"""Seconds after which a process that dies is started again as if it were the first one to die."""
LONGEST_PAUSE = 60.0
"""Maximum number of seconds between a process's death and the start of the next one."""
PATIENCE = 5.0
"""Seconds of such a pause in which new requests wait; they are refused while it is longer, or when a start failed."""


def pause_after(deaths: int) -> float:
    """Seconds until a process is started in the place of one that died, the last of so many in a row: 0, 1, 2, 4..."""
    return 0.0 if deaths <= 1 else min(LONGEST_PAUSE, 2.0 ** (deaths - 2))


class Deployment:
    """A name, and the process that answers for it."""

    def __init__(self, name: str, settings: Settings, queue: int):
        self.name, self.settings, self.queue = name, settings, queue
        self.worker: Worker | None = None
        self.restarts = 0
        self._changing = asyncio.Lock()
        self._before: Place | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._pending = PendingRequests()
        self._deaths = 0  # in a row
        self._next_start: float | None = None  # by time.monotonic(), while new requests are refused
        self._restarting: asyncio.Task[None] | None = None

    @property
    def place(self) -> Place:
        assert self.worker is not None
        return self.worker.place

    @property
    def about(self) -> dict[str, Any]:
        """What the worker told of its model (worker.described)."""
        assert self.worker is not None
        return self.worker.about

    @property
    def full(self) -> bool:
        """Whether it has as many requests as it may."""
        return self.worker is not None and self.open_requests >= self.queue

    @property
    def open_requests(self) -> int:
        """Number of requests that the process works at or that wait for one."""
        return len(self._pending.waiting) + (len(self.worker.open) if self.worker else 0)

    @property
    def ready(self) -> bool:
        """Whether its process lives; else another one is being started."""
        return self.worker is not None and self.worker.alive

    async def start(self, place: Place) -> None:
        """Let this model answer from now on. Raises UsageError where it cannot be loaded."""
        self.worker = await Worker.start(place, self.settings, self._admit, self._died)
        self._next_start = None
        self._admit()

    async def swap(self, place: Place) -> None:
        """Let another model answer from now on; what is being answered is finished by the one before."""
        async with self._changing:
            old = self.worker
            await self.start(place)
            self._deaths = 0
            if old is not None:
                self._before = old.place
                leaving = asyncio.create_task(old.stop(600.0))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)

    async def rollback(self) -> None:
        """Raises UsageError where nothing was there before."""
        if self._before is None:
            raise UsageError(f"Of {self.name} there is no earlier model.")
        await self.swap(self._before)

    def _died(self, worker: Worker) -> None:
        self._pending.survive(worker.open.values())
        worker.open = {}
        if worker is self.worker and not worker.leaving:
            self._restarting = asyncio.create_task(self._restart(worker))
        self._admit()

    async def _restart(self, dead: Worker) -> None:
        """Start processes in the place of one that died until one lives, or another model has taken its place."""
        dead.process.kill()  # it has closed its end, but whether it is gone nobody knows
        code = await asyncio.to_thread(dead.process.wait)
        if time.monotonic() - dead.began > HEALTHY:
            self._deaths = 0
        started = True
        while self.worker is dead:
            self._deaths += 1
            pause = pause_after(self._deaths)
            log.warning("the process of %s died (exit code %s); a new one starts in %.0f s", self.name, code, pause)
            if not started or pause > PATIENCE:
                self._next_start = time.monotonic() + pause
                self._pending.fail(self._starting())
            await asyncio.sleep(pause)
            async with self._changing:
                if self.worker is not dead:
                    return
                self.restarts += 1
                try:
                    await self.start(dead.place)
                except (UsageError, OSError) as error:  # its words may tell of the server's files
                    log.error("%s cannot be started again: %s", self.name, error)
                    started = False

    def _starting(self) -> Refusal:
        assert self._next_start is not None
        seconds = max(1.0, self._next_start - time.monotonic())
        return Refusal(ErrorKind.STARTING, f"The model {self.name} is being restarted.", retry_after=seconds)

    def _admit(self) -> None:
        """Send the process all that it may work at now."""
        while self.worker and self.worker.alive and (request := self._pending.next(self.worker.open.values())):
            self.worker.ask(request)

    async def ask(
        self, identity: str, message: Mapping[str, Any], heard: Heard = lambda _: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Pieces of text, then the answer: {"value", "finished"}; all with the cost so far: "tokens" and
        "prompt_tokens". Raises Refusal."""
        if self.full:
            raise Refusal(ErrorKind.FULL, f"{self.queue} requests are running or waiting already.")
        if self._next_start is not None:
            raise self._starting()
        if seconds := self._pending.refused_for(message):
            raise deadly(seconds)
        request = PendingRequest.of(identity, message, heard)
        timer = self._pending.add(request)
        self._admit()
        try:
            while True:
                event = await request.next_event()
                if "error" in event:
                    raise refusal_of(event)
                yield event
                if "value" in event:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            self._pending.drop(request)

    async def stop(self, seconds: float = 30.0) -> None:
        """After what it works at, and what waits; what takes longer than these seconds is refused."""
        until = time.monotonic() + seconds
        while self.open_requests and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        if self.worker is not None:
            await self.worker.stop(until - time.monotonic())
        self._pending.fail(Refusal(ErrorKind.STOPPING, "The server is stopping."))
        await asyncio.gather(*self._leaving)


class Fleet:
    """Deployments by name; the first one answers where no name is given."""

    def __init__(self, settings: Settings | None = None, queue: int = QUEUE):
        self.settings, self.queue = settings or Settings(), queue
        self.deployments: dict[str, Deployment] = {}
        self.closing = False  # whether new requests are to go elsewhere
        self._closed = False
        self._numbers = itertools.count()

    async def deploy(self, name: str, place: Place) -> Deployment:
        """Under a new name, or in the place of what is there."""
        if name in self.deployments:
            await self.deployments[name].swap(place)
        else:
            deployment = Deployment(name, self.settings, self.queue)
            await deployment.start(place)
            self.deployments[name] = deployment
        return self.deployments[name]

    def get(self, name: str | None) -> Deployment:
        """Raises UsageError for a name that is not there."""
        if name is None:
            return next(iter(self.deployments.values()))
        if name not in self.deployments:
            known = list(self.deployments)
            message = f"There is no model {cut(name)}.{suggest(name, known)} There are: {', '.join(known)}."
            raise UsageError(message, kind=ErrorKind.NOT_FOUND, code="model_not_found", param="model")
        return self.deployments[name]

    @property
    def unready(self) -> list[str]:
        """Names of the models whose process is being started again."""
        return [name for name, one in self.deployments.items() if not one.ready]

    @property
    def full(self) -> bool:
        """Whether none of the models takes another request."""
        return bool(self.deployments) and all(one.full for one in self.deployments.values())

    @property
    def busy(self) -> bool:
        """Whether each of the models has half of the requests that it may have."""
        return bool(self.deployments) and all(2 * one.open_requests >= one.queue for one in self.deployments.values())

    def ask(
        self, name: str | None, message: Mapping[str, Any], heard: Heard = lambda _: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """See Deployment.ask. Raises Refusal when the fleet is stopping."""
        if self._closed:
            raise Refusal(ErrorKind.STOPPING, "The server is stopping.")
        return self.get(name).ask(str(next(self._numbers)), message, heard)

    async def stop(self, seconds: float = 30.0) -> None:
        """Refuse what is new, finish what is being answered."""
        self.closing = self._closed = True
        await asyncio.gather(*(deployment.stop(seconds) for deployment in self.deployments.values()))

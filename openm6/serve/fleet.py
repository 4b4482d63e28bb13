"""Deployments: named models, each in a process of its own, which is restarted when it dies and can be replaced.

A process that dies is restarted at once, after longer and longer pauses if it dies again and again. Its open requests
are sent to the next one (pending.py). A text that was begun is continued only if the next process repeats its
beginning."""

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
"""Maximum number of running and waiting requests of a process; further ones are refused."""
HEALTHY = 60.0
"""Lifetime, in seconds, after which a death counts as the first one again."""
LONGEST_PAUSE = 60.0
"""Maximum number of seconds between a process's death and the start of the next one."""
PATIENCE = 5.0
"""Longest pause, in seconds, in which new requests wait; they are refused in a longer one, and after a failed start."""


def pause_after(deaths: int) -> float:
    """Seconds until the restart after so many deaths in a row: 0, 1, 2, 4..."""
    return 0.0 if deaths <= 1 else min(LONGEST_PAUSE, 2.0 ** (deaths - 2))


class Deployment:
    """A named model and its process."""

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
        """The description of the model (worker.described)."""
        assert self.worker is not None
        return self.worker.about

    @property
    def full(self) -> bool:
        """Whether it has the maximum number of requests."""
        return self.worker is not None and self.open_requests >= self.queue

    @property
    def open_requests(self) -> int:
        """Number of running and waiting requests."""
        return len(self._pending.waiting) + (len(self.worker.open) if self.worker else 0)

    @property
    def ready(self) -> bool:
        """Whether its process lives; else it is being restarted."""
        return self.worker is not None and self.worker.alive

    async def start(self, place: Place) -> None:
        """Start the process of a model. Raises UsageError where it cannot be loaded."""
        self.worker = await Worker.start(place, self.settings, self._admit, self._died)
        self._next_start = None
        self._admit()

    async def swap(self, place: Place) -> None:
        """Replace the model; running requests are finished by the previous one."""
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
        """Swap back to the previous model. Raises UsageError where there is none."""
        if self._before is None:
            raise UsageError(f"{self.name} has no earlier model.")
        await self.swap(self._before)

    def _died(self, worker: Worker) -> None:
        self._pending.survive(worker.open.values())
        worker.open = {}
        if worker is self.worker and not worker.leaving:
            self._restarting = asyncio.create_task(self._restart(worker))
        self._admit()

    async def _restart(self, dead: Worker) -> None:
        """Restart a process that died, until a start succeeds or another model has replaced it."""
        dead.process.kill()  # it has closed its connection, but may still live
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
                except (UsageError, OSError) as error:  # its message may name files of the server
                    log.error("%s cannot be started again: %s", self.name, error)
                    started = False

    def _starting(self) -> Refusal:
        assert self._next_start is not None
        seconds = max(1.0, self._next_start - time.monotonic())
        return Refusal(ErrorKind.STARTING, f"The model {self.name} is being restarted.", retry_after=seconds)

    def _admit(self) -> None:
        """Send the process all requests that it may work at now."""
        while self.worker and self.worker.alive and (request := self._pending.next(self.worker.open.values())):
            self.worker.ask(request)

    async def ask(
        self, identity: str, message: Mapping[str, Any], heard: Heard = lambda _: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send a request. Yields pieces of text, then the answer {"value", "finished"}, each with the cost so far
        ("tokens", "prompt_tokens"). Raises Refusal."""
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
        """Stop after the running and waiting requests; those that take longer than these seconds are refused."""
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
    """Deployments by name; the first one is the default."""

    def __init__(self, settings: Settings | None = None, queue: int = QUEUE):
        self.settings, self.queue = settings or Settings(), queue
        self.deployments: dict[str, Deployment] = {}
        self.closing = False  # whether new requests are refused
        self._closed = False
        self._numbers = itertools.count()

    async def deploy(self, name: str, place: Place) -> Deployment:
        """Deploy a model under a new name, or in place of the one of that name."""
        if name in self.deployments:
            await self.deployments[name].swap(place)
        else:
            deployment = Deployment(name, self.settings, self.queue)
            await deployment.start(place)
            self.deployments[name] = deployment
        return self.deployments[name]

    def get(self, name: str | None) -> Deployment:
        """The deployment of a name. Raises UsageError (NOT_FOUND) for an unknown one."""
        if name is None:
            return next(iter(self.deployments.values()))
        if name not in self.deployments:
            known = list(self.deployments)
            message = f"There is no model {cut(name)}.{suggest(name, known)} There are: {', '.join(known)}."
            raise UsageError(message, kind=ErrorKind.NOT_FOUND, code="model_not_found", param="model")
        return self.deployments[name]

    @property
    def unready(self) -> list[str]:
        """Names of the models whose process is being restarted."""
        return [name for name, one in self.deployments.items() if not one.ready]

    @property
    def full(self) -> bool:
        """Whether no model accepts another request."""
        return bool(self.deployments) and all(one.full for one in self.deployments.values())

    @property
    def busy(self) -> bool:
        """Whether each model has at least half of its maximum number of requests."""
        return bool(self.deployments) and all(2 * one.open_requests >= one.queue for one in self.deployments.values())

    def ask(
        self, name: str | None, message: Mapping[str, Any], heard: Heard = lambda _: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """See Deployment.ask. Raises Refusal when the fleet is stopping."""
        if self._closed:
            raise Refusal(ErrorKind.STOPPING, "The server is stopping.")
        return self.get(name).ask(str(next(self._numbers)), message, heard)

    async def stop(self, seconds: float = 30.0) -> None:
        """Refuse new requests and finish the open ones."""
        self.closing = self._closed = True
        await asyncio.gather(*(deployment.stop(seconds) for deployment in self.deployments.values()))

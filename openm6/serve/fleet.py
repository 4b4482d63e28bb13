"""Models behind names, each in a process of its own: started, asked, restarted when it dies, exchanged for another.

What was asked of a process that dies is asked again of the next one, once: the same request has the same answer, so of
a text that was begun only what is new is told.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openm6.errors import OpenM6Error, UsageError, suggest
from openm6.serve.engine import Settings
from openm6.serve.wire import DIED, FULL, STOPPING, Messages, packed

log = logging.getLogger("openm6.serve")

QUEUE = 256
"""Requests that a process has at most, those it works at and those that wait; further ones are refused."""
STARTING = 300.0
"""Seconds that a model may take to load."""
TRIES = 2
"""Processes that a request is asked of."""


class Refused(OpenM6Error):
    """What the server answers with an error of this kind (wire.py). `seconds`: after which it may be asked again."""

    def __init__(
        self, kind: str, message: str, code: str | None = None, param: str | None = None, seconds: float | None = None
    ):
        super().__init__(message, code=code or kind, param=param)
        self.kind, self.seconds = kind, seconds


@dataclass(frozen=True, slots=True)
class Place:
    """What a process serves: a model directory and adapters of it by name."""

    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)


class Worker:
    """One process."""

    def __init__(self, place: Place, process: subprocess.Popen[bytes]):
        self.place, self.process = place, process
        self._open: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        self._states: list[asyncio.Future[dict[str, Any]]] = []
        self.about: dict[str, Any] = {}
        self.alive = True
        self._first: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._connection: asyncio.WriteTransport

    @classmethod
    async def start(cls, place: Place, settings: Settings) -> Worker:
        """Raises UsageError where the model cannot be loaded."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "openm6.serve.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ,
            )  # fmt: skip
        worker = cls(place, process)
        worker._connection, _ = await asyncio.get_running_loop().create_connection(
            lambda: Messages(worker._hear, worker._end), sock=ours
        )
        adapters = {name: str(path) for name, path in place.adapters.items()}
        worker._send({"model": str(place.model), "adapters": adapters, "settings": asdict(settings)})
        try:
            first = await asyncio.wait_for(worker._first, STARTING)
        except TimeoutError:
            first = {"fatal": f"it took more than {STARTING:.0f} seconds to load."}
        if "ready" not in first:
            process.kill()
            await asyncio.to_thread(process.wait)
            worker._connection.close()
            raise UsageError(first.get("fatal") or f"The process for {place.model} ended as it began.")
        worker.about = first["ready"]
        return worker

    def _hear(self, message: dict[str, Any]) -> None:
        if (queue := self._open.get(message.get("id", ""))) is not None:
            queue.put_nowait(message)
        elif "state" in message:
            for future in self._states:
                if not future.done():
                    future.set_result(message["state"])
            self._states.clear()
        elif not self._first.done():
            self._first.set_result(message)

    def _end(self) -> None:
        """The process closed its end, as it does when it dies."""
        self.alive = False
        if not self._first.done():
            self._first.set_result({})
        died = {"error": DIED, "message": "The process that worked at this ended."}
        for queue in self._open.values():
            queue.put_nowait(died)
        for future in self._states:
            if not future.done():
                future.set_result({})

    async def ask(self, identity: str, message: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """What becomes of a request; whoever stops listening has it cancelled."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        if not self.alive:
            yield {"error": DIED, "message": "The process has ended."}
            return
        self._open[identity] = queue
        ended = False
        try:
            self._send({"do": "ask", "id": identity, **message})
            while not ended:
                told = await queue.get()
                ended = "value" in told or "error" in told
                yield told
        finally:
            del self._open[identity]
            if not ended and self.alive:
                self._send({"do": "cancel", "id": identity})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._connection.write(packed(message))

    @property
    def busy(self) -> int:
        return len(self._open)

    async def state(self) -> dict[str, Any]:
        """What the engine has done and holds; empty of a process that is gone."""
        if not self.alive:
            return {}
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._states.append(future)
        self._send({"do": "state"})
        return await future

    async def stop(self, seconds: float = 30.0) -> None:
        """After what it works at; at once when that takes longer than these seconds."""
        until = time.monotonic() + seconds
        while self.alive and self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.alive:
            self._send({"do": "stop"})
            try:
                await asyncio.wait_for(asyncio.to_thread(self.process.wait, max(1.0, until - time.monotonic())), None)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._connection.close()
        await asyncio.to_thread(self.process.wait)


class Deployment:
    """A name, and the process that answers for it."""

    def __init__(self, name: str, settings: Settings, queue: int):
        self.name, self.settings, self.queue = name, settings, queue
        self.worker: Worker | None = None
        self.restarts = 0
        self._changing = asyncio.Lock()
        self._before: Place | None = None
        self._leaving: set[asyncio.Task[None]] = set()

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
        return self.worker is not None and self.worker.busy >= self.queue

    @property
    def busy(self) -> bool:
        """Whether it has half of the requests that it may have."""
        return self.worker is not None and self.worker.busy >= self.queue / 2

    async def start(self, place: Place) -> None:
        self.worker = await Worker.start(place, self.settings)

    async def swap(self, place: Place) -> None:
        """Let another model answer from now on; what is being answered is finished by the one before."""
        async with self._changing:
            new = await Worker.start(place, self.settings)
            old, self.worker = self.worker, new
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

    async def _alive(self) -> Worker:
        """The process, a new one when it has died."""
        async with self._changing:
            assert self.worker is not None
            if not self.worker.alive:
                self.restarts += 1
                code = await asyncio.to_thread(self.worker.process.wait)
                log.warning("the process of %s died (exit code %s); a new one starts", self.name, code)
                try:
                    self.worker = await Worker.start(self.worker.place, self.settings)
                except UsageError as error:
                    raise Refused(DIED, f"The model cannot be started again: {error}") from None
            return self.worker

    async def ask(self, identity: str, message: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Pieces of text, then the answer: {"value", "finished", "tokens", "prompt_tokens"}. Raises Refused."""
        if self.full:
            raise Refused(FULL, f"{self.queue} requests are being worked at or wait already.")
        told = ""
        for left in range(TRIES, 0, -1):
            worker = await self._alive()
            text, died = "", False
            async with aclosing(worker.ask(f"{identity}-{left}", message)) as events:
                async for event in events:
                    if "error" in event:
                        died = event["error"] == DIED
                        if died and left > 1:
                            break
                        raise Refused(event["error"], event["message"], event.get("code"), event.get("param"))
                    if piece := event.get("piece", ""):
                        text += piece
                        new = text[len(told) :]
                        told = text if len(text) > len(told) else told
                        event = {**event, "piece": new}
                    yield event
                    if "value" in event:
                        return
            if not died:
                return

    async def stop(self, seconds: float = 30.0) -> None:
        if self.worker is not None:
            await self.worker.stop(seconds)
        await asyncio.gather(*self._leaving)


class Fleet:
    """Deployments by name; the first one answers where no name is given."""

    def __init__(self, settings: Settings | None = None, queue: int = QUEUE):
        self.settings, self.queue = settings or Settings(), queue
        self.deployments: dict[str, Deployment] = {}
        self.closing = False
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
            raise UsageError(f"There is no model {name}.{suggest(name, known)} There are: {', '.join(known)}.")
        return self.deployments[name]

    @property
    def full(self) -> bool:
        """Whether none of the models takes another request."""
        return bool(self.deployments) and all(one.full for one in self.deployments.values())

    @property
    def busy(self) -> bool:
        """Whether each of the models has half of the requests that it may have."""
        return bool(self.deployments) and all(one.busy for one in self.deployments.values())

    def ask(self, name: str | None, message: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """See Deployment.ask. Raises Refused when the server is closing."""
        if self.closing:
            raise Refused(STOPPING, "The server is stopping.")
        return self.get(name).ask(str(next(self._numbers)), message)

    async def stop(self, seconds: float = 30.0) -> None:
        """Refuse what is new, finish what is being answered."""
        self.closing = True
        await asyncio.gather(*(deployment.stop(seconds) for deployment in self.deployments.values()))

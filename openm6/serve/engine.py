"""The engine: one thread that takes many requests at once through one network, step by step.

Two kinds of work. Texts are written together: whoever comes is read (prefill) and joins at the next step, whoever is
done leaves, so that a step is one pass for all of them. Everything else (pictures in passes, beams, texts from a
sketch, vectors, heads) is work in steps of its own (inference/steps.py), alike requests in one batch. Between the two
the engine shares its time evenly: it goes on with the kind that has had less of it.

What a request gets is what the offline decoder gives it alone, whatever else is being done: rows do not see each other,
and each has its own random numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import torch

from openm6.core.errors import UsageError
from openm6.inference.session import Session
from openm6.inference.steps import Steps
from openm6.serve.features import Features
from openm6.serve.settings import Settings
from openm6.serve.texts import Texts
from openm6.serve.work import LATE, Request, Told, prepared, steps_of

MIB = 2**20
GONE = "The request was cancelled."
JOBS = 2
"""That are worked at in turn, so that a short one does not wait for a long one."""
EARLY = 1024
"""Cancellations that are remembered at most because their request is not there: it may still be read."""


@dataclass(slots=True)
class _Job:
    """Alike requests in steps."""

    requests: list[Request | None]  # None in the place of one that was cancelled
    steps: Steps[list[Any]]
    adapter: str | None


@dataclass(slots=True)
class Counts:
    """What the engine has done since it began."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"texts": 0.0, "jobs": 0.0})


class Engine:
    """`submit` and `cancel` from any thread; `run` in one of its own until `stop`.

    `tell` is called in the engine's thread with what becomes of each request: pieces of text, the answer, or why there
    is none.
    """

    def __init__(self, session: Session, tell: Callable[[Told], None], settings: Settings | None = None):
        self.session, self.settings, self._tell = session, settings or Settings(), tell
        self.counts = Counts()
        image = session.model.image
        self.features = Features.of(image, self.settings.prefix_mib * MIB) if image is not None else None
        self._inbox: deque[Request] = deque()
        self._gone: set[str] = set()
        self._early: dict[str, None] = {}
        self._change = Condition()
        self._ending = False
        self._texts: dict[str | None, Texts] = {}
        self._waiting: deque[Request] = deque()  # for a job
        self._jobs: deque[_Job] = deque()
        self._open: dict[str, Request] = {}

    # From other threads

    def submit(self, request: Request) -> None:
        """Reads the request's texts and pictures, in the thread that calls. Raises UsageError or DataError for what
        cannot be done, or once the engine is stopping, TimeoutError once the request's deadline has passed, and
        CancelledError for a request that has been cancelled already."""
        if request.is_late():
            raise TimeoutError(LATE)
        with self._change:
            if request.id in self._gone or request.id in self._early:
                self.counts.cancelled += 1
                raise CancelledError(GONE)
        prepared(request, self._view(request.adapter))
        if request.needs > self._room:
            raise UsageError(
                f"This takes {request.needs / MIB:.0f} MiB; the server has {self._room / MIB:.0f} for a request "
                "(half of cache_mib): ask for fewer pictures or beams."
            )
        with self._change:
            if self._ending:
                raise UsageError("The engine is stopping.")
            self._inbox.append(request)
            self._change.notify()

    def cancel(self, identity: str) -> None:
        """The last event of this request says that it was cancelled, and what it cost until then; what it holds is free
        at the next step. It may come before the request does, while that one is read."""
        with self._change:
            self._gone.add(identity)
            self._change.notify()

    def stop(self) -> None:
        """`run` returns when all that was submitted is answered."""
        with self._change:
            self._ending = True
            self._change.notify()

    @property
    def _room(self) -> int:
        """Bytes for one of the jobs."""
        return self.settings.cache_mib * MIB // JOBS

    @property
    def waiting(self) -> int:
        return len(self._inbox) + len(self._waiting) + sum(len(texts.waiting) for texts in list(self._texts.values()))

    @property
    def running(self) -> int:
        return len(self._open) - self.waiting

    # In the engine's thread

    def run(self) -> None:
        while self._next():
            pass

    def _next(self) -> bool:
        """One step of the kind of work that has had less time; False when there is nothing more to come."""
        with self._change:
            while not (self._inbox or self._gone or self._open):
                if self._ending:
                    return False
                self._change.wait()
            taken, gone = list(self._inbox), self._gone
            self._inbox.clear()
            self._gone = set()
        for request in taken:
            if request.id in self._early:
                self.counts.cancelled += 1
                self._tell(Told(request.id, error=CancelledError(GONE), done=True))
            else:
                self._take(request)
        self._forget(gone)
        texts = [lane for lane in self._texts.values() if lane.rows or lane.waiting]
        jobs = bool(self._jobs or self._waiting)
        spent = self.counts.seconds
        if texts and (not jobs or spent["texts"] <= spent["jobs"]):
            self._spend("texts", lambda: self._write(texts), alone=not jobs)
        elif jobs:
            self._spend("jobs", self._work, alone=not texts)
        return True

    def _spend(self, kind: str, act: Callable[[], Any], alone: bool) -> None:
        started = time.perf_counter()
        act()
        self.counts.steps += 1
        other = "jobs" if kind == "texts" else "texts"
        spent = self.counts.seconds
        spent[kind] += time.perf_counter() - started
        if alone:  # time that nobody else wanted is not held against it
            spent[other] = max(spent[other], spent[kind])

    def _take(self, request: Request) -> None:
        self._open[request.id] = request
        if request.alone:
            self._waiting.append(request)
            return
        if request.adapter not in self._texts:
            self._texts[request.adapter] = Texts(self.session, request.adapter, self.settings)
        self._texts[request.adapter].waiting.append(request)

    def _view(self, adapter: str | None) -> Session:
        return self.session.adapter(adapter) if adapter else self.session

    def _forget(self, gone: set[str]) -> None:
        """Requests that were cancelled, and those whose time is over."""
        for identity in gone | {request.id for request in self._open.values() if request.is_late()}:
            request = self._open.get(identity)
            if request is None:
                self._early[identity] = None
                if len(self._early) > EARLY:
                    del self._early[next(iter(self._early))]
                continue
            for lane in self._texts.values():
                lane.remove(request)
            if request in self._waiting:
                self._waiting.remove(request)
            for job in list(self._jobs):
                job.requests = [None if one is request else one for one in job.requests]
                if not any(job.requests):
                    self._jobs.remove(job)
            if identity in gone:
                self._fail(request, CancelledError(GONE))
            else:
                self._fail(request, TimeoutError(LATE))

    def _write(self, lanes: list[Texts]) -> None:
        for lane in lanes:
            for act in (lane.advance, lane.admit):
                try:
                    every = act()
                except Exception as error:  # nobody knows in what state they are; those that wait go on
                    lane.clear()
                    for request in [*self._open.values()]:
                        if not request.alone and request.adapter == lane.adapter and request not in lane.waiting:
                            self._fail(request, error)
                    break
                for told in every:
                    self._told(told)

    def _work(self) -> None:
        """One step of a job; the jobs take turns."""
        if self._waiting and len(self._jobs) < JOBS:
            self._jobs.appendleft(self._begun())
        job = self._jobs.popleft()
        try:
            with torch.inference_mode(), self._view(job.adapter).precision():
                counts = next(job.steps)
        except StopIteration as done:
            for request, value in zip(job.requests, done.value, strict=True):
                if request is not None:
                    self._told(Told(request.id, value=value, done=True, finished=request.finished))
        except Exception as error:
            self._apart(job, error)
        else:
            for request, count in zip(job.requests, counts, strict=True):
                if request is not None:
                    request.tokens += count
            self._jobs.append(job)

    def _begun(self) -> _Job:
        first = self._waiting.popleft()
        chosen, rest, needed = [first], list[Request](), first.needs
        while self._waiting and len(chosen) < self.settings.batch:
            other = self._waiting.popleft()
            fits = other.like == first.like and needed + other.needs <= self._room
            (chosen if fits else rest).append(other)
            needed += other.needs * fits
        self._waiting.extendleft(reversed(rest))
        for request in chosen:
            assert request.prompt is not None
            request.prompt_tokens = len(request.prompt)
        return _Job([*chosen], steps_of(self._view(first.adapter), chosen), first.adapter)

    def _apart(self, job: _Job, error: Exception) -> None:
        """What went wrong together is tried one by one, each within the room that a job has: only whose fault it is
        fails."""
        left = [request for request in job.requests if request is not None]
        if len(left) == 1:
            self._fail(left[0], error)
            return
        for request in reversed(left):
            request.tokens = 0  # what was in vain is not the customer's
            request.like = request.id  # it joins no other
            self._waiting.appendleft(request)

    def _told(self, told: Told) -> None:
        request = self._open[told.id]
        told.tokens, told.prompt_tokens = request.tokens, request.prompt_tokens
        if told.done or told.error is not None:
            del self._open[told.id]
            told.truncated = request.prompt.cut if request.prompt is not None else 0
            cancelled = isinstance(told.error, CancelledError)
            self.counts.answered += told.error is None
            self.counts.cancelled += cancelled
            self.counts.failed += told.error is not None and not cancelled
            self.counts.tokens += told.tokens
            self.counts.prompt_tokens += told.prompt_tokens
        self._tell(told)

    def _fail(self, request: Request, error: Exception) -> None:
        self._told(Told(request.id, error=error, done=True))

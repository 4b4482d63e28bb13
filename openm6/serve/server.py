"""State and functions shared by all routes: authentication, requests to models, and their answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, Request
from pydantic import Field

from openm6.core.errors import ErrorKind, OpenM6Error, Refusal, UsageError, cut, suggest
from openm6.inference import Decoding
from openm6.inference.draw import Drawing
from openm6.inference.rank import fresh_seed
from openm6.serve.bodies import AskingFields
from openm6.serve.figures import Figures, History, end_span
from openm6.serve.fleet import Deployment, Fleet
from openm6.serve.guard import API, note, unless_gone
from openm6.serve.incoming import Pictures, pictures_in, record_of
from openm6.serve.keys import MANAGE, USE, Key, Keys
from openm6.serve.meter import Charge, Meter

LOCAL = Key("local", "", MANAGE)
"""The key of all clients where none is needed: a server that listens on this machine alone."""
AT_ONCE = 32
"""Maximum number of running requests of a batch."""
WAIT = 0.05
"""Seconds between two tries of a request of a batch that was refused as FULL."""


@dataclass(frozen=True)
class Options:
    """Options of the server.

    keys            file of keys (keys.py); None: no key is needed, for a server on the loopback address
    hosts           hosts from which pictures may be fetched
    loopback        whether only this machine may send requests, by its loopback names, and no page of another site
    body_mib        maximum size of a request's body, in MiB
    body_seconds    maximum number of seconds between two parts of a request's body
    origins         origins of web pages of other sites that may use the API
    seconds         time limit of a request, which may ask for a shorter one
    drain           seconds to finish running requests when the server stops
    """

    keys: Path | None = None
    hosts: tuple[str, ...] = ()
    loopback: bool = False
    body_mib: int = 64
    body_seconds: float = 10.0
    origins: tuple[str, ...] = ()
    seconds: float = 300.0
    drain: float = 30.0


class TaskRequest(AskingFields):
    """A request to a task."""

    inputs: dict[str, Any] = Field(default_factory=dict, description="a value for each of the task's slots")
    decoding: dict[str, int | float] = Field(default_factory=dict, description="options of decoding or drawing")
    examples: list[dict[str, Any]] = Field(default_factory=list, max_length=64, description="records with answers")
    candidates: int = Field(1, ge=1, le=16, description="pictures, the best first")
    stream: bool = Field(False, description="pieces of a text as they are written")
    probabilities: bool = Field(False, description="of all labels, of a task whose output is one")
    seconds: float | None = Field(None, gt=0, le=3600, description="after which the request fails")
    stop: list[str] = Field(default_factory=list, max_length=64, description="a text ends before the first of these")
    system: str | None = Field(None, description="text before all; the default is the task's, else the model's")
    thinking: bool | None = Field(None, description="reason before the answer, where the model can")


@dataclass
class Server:
    """The state that all routes share."""

    fleet: Fleet
    options: Options
    figures: Figures = field(default_factory=Figures)
    tracer: Any = None  # of OpenTelemetry (figures.add_traces)
    at_end: list[Callable[[], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        file = self.options.keys
        self.keys = Keys(file) if file else None
        self.meter = Meter(self.keys.spent if self.keys else None)
        self.pictures = Pictures(self.options.hosts)
        self.history = History(self.fleet)

    def key_of(self, request: Request, role: str) -> Key:
        """The key of a request, which is counted. Raises Refusal where it may not make the request."""
        key = self.find_key(request.headers.get("authorization", ""))
        if key is LOCAL:
            return key
        request.state.key = key.name
        if not key.may(role):
            message = f"The key {key.name} may not do that: a key with the role {role} is needed."
            raise Refusal(ErrorKind.FORBIDDEN, message)
        request.state.limits = partial(self.meter.headers, key)
        self.meter.count(key)
        return key

    def find_key(self, authorization: str) -> Key:
        """The key that a header names; LOCAL where none is needed. Raises Refusal (401) for one that is not valid."""
        if self.keys is None:
            return LOCAL
        kind, _, secret = authorization.partition(" ")
        key = self.keys.find(secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise Refusal(ErrorKind.UNAUTHORIZED, "A key is needed: Authorization: Bearer m6-...", "invalid_api_key")
        return key

    def takes_texts_only(self, path: str) -> bool:
        """Whether requests to a path of the API hold neither pictures nor many texts."""
        if not path.startswith(API) or path.endswith("/batch"):
            return False
        if path.startswith(f"{API}tasks/"):
            name = path.removeprefix(f"{API}tasks/")
            tasks = [one.about["tasks"].get(name, {}) for one in self.fleet.deployments.values()]
            return not any({"image", "messages"} & set(task.get("slots", {}).values()) for task in tasks)
        return not path.startswith((f"{API}chat/", f"{API}embeddings", f"{API}images/edits"))

    def task(self, deployment: Deployment, name: str, code: str = "task_not_found") -> dict[str, Any]:
        """The description of a task (worker.described). Raises UsageError (NOT_FOUND, with this code) for an unknown
        name; a path is never one."""
        tasks: dict[str, dict[str, Any]] = deployment.about["tasks"]
        if name not in tasks:
            message = f"The model {deployment.name} has no task {cut(name)}.{suggest(name, list(tasks))}"
            raise UsageError(message, kind=ErrorKind.NOT_FOUND, code=code)
        return tasks[name]

    def trained_task(
        self, deployment: Deployment, name: str, adapter: str | None, allow_untrained: bool
    ) -> dict[str, Any]:
        """As `task`. Raises UsageError too for a task that neither the model nor this adapter of it was trained on,
        unless the request allows it."""
        told = self.task(deployment, name)
        if allow_untrained or is_trained(told, adapter):
            return told
        trained = ", ".join(one for one, other in deployment.about["tasks"].items() if other["trained"]) or "no task"
        adapters = "".join(f" The adapter {one} was trained on it." for one in told["trained_adapters"])
        raise UsageError(
            f"The model {deployment.name} was not trained on the task {name}, so that its answers would mean nothing: "
            f"it was trained on {trained}.{adapters} To ask it all the same send allow_untrained: true.",
            code="task_not_trained", param="model",
        )  # fmt: skip

    async def message(self, deployment: Deployment, task: str, asked: TaskRequest) -> dict[str, Any]:
        """A message to the worker, with a fresh seed where it samples and none is given. Raises as `trained_task`."""
        note(deployment.name, task)
        told = self.trained_task(deployment, task, asked.adapter, asked.allow_untrained)
        decoding = dict(asked.decoding)
        if samples(told, decoding):
            decoding.setdefault("seed", fresh_seed())
        slots = told["slots"]
        read = partial(
            record_of, slots=slots, pictures=self.pictures, positions=deployment.about["positions"],
            truncate=asked.truncate,
        )  # fmt: skip
        # Examples may have further columns; the inputs may not.
        every = [asked.inputs, *({name: one[name] for name in slots if name in one} for one in asked.examples)]
        pictures = [one.get(slot) for one in every for slot, kind in slots.items() if kind == "image"]
        talks = [one.get(slot) for one in every for slot, kind in slots.items() if kind == "messages"]
        pictures += [picture for talk in talks for picture in pictures_in(talk)]
        computed = [one for one in pictures if isinstance(one, Mapping) and "features" in one]
        if any(one.get("image_encoder") != deployment.about["image_encoder"] for one in computed):
            message = f"These features were not made by the image encoder of {deployment.name}."
            raise Refusal(ErrorKind.CONFLICT, message, "other_image_encoder")
        if not all(value is None or self.pictures.is_quick(value) for value in pictures):
            record, *examples = await asyncio.to_thread(lambda: [read(one) for one in every])
        else:
            record, *examples = [read(one) for one in every]
        return {
            "task": task, "record": record, "decoding": decoding, "adapter": asked.adapter,
            "candidates": asked.candidates, "examples": examples, "probabilities": asked.probabilities,
            "stop": asked.stop, "truncate": asked.truncate, "system": asked.system, "thinking": asked.thinking,
            "seconds": min(asked.seconds or self.options.seconds, self.options.seconds),
        }  # fmt: skip

    async def answer(
        self, charge: Charge, deployment: Deployment, message: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The worker's events, charged as they arrive, even after the client has left. Requests with the same `charge`
        pay for their prompt once. Raises Refusal, also for a key that has spent its tokens."""
        key = charge.key
        labels = deployment.name, self.task(deployment, message["task"])["kind"]
        most = highest_cost(deployment.about, message) if key.per_day else 0
        self.meter.check(key)
        while not self.meter.reserve(key, most):
            await asyncio.sleep(WAIT)
            self.meter.check(key)
        cost, prompt_tokens = charge.request(most), 0
        started, first = time.perf_counter(), True
        status, about = "cancelled", {"openm6.model": deployment.name, "openm6.task": message["task"]}
        span = self.tracer and self.tracer.start_span("answer", attributes=about)

        def heard(event: Mapping[str, Any]) -> None:
            nonlocal prompt_tokens
            written, read = cost.tokens, charge.prompt_tokens
            cost.hear(event)
            self.figures.tokens.labels(*labels).inc(cost.tokens - written)
            self.figures.prompt_tokens.labels(*labels).inc(charge.prompt_tokens - read)
            prompt_tokens += charge.prompt_tokens - read

        try:
            async with aclosing(self.fleet.ask(deployment.name, message, heard)) as events:
                async for event in events:
                    if first:
                        self.figures.first.labels(*labels).observe(time.perf_counter() - started)
                        first = False
                        if span:
                            span.add_event("first")
                    if "value" in event:
                        status = "ok"
                    yield event
        except OpenM6Error as error:
            status = str(error.kind)
            raise
        finally:
            cost.leave()
            if span:
                end_span(span, status, cost.tokens)
            note(deployment.name, message["task"], prompt_tokens, cost.tokens)
            self.figures.requests.labels(*labels, status).inc()
            self.figures.seconds.labels(*labels).observe(time.perf_counter() - started)

    async def whole(
        self, charge: Charge, deployment: Deployment, message: Mapping[str, Any], request: Request | None = None
    ) -> dict[str, Any]:
        """The answer alone, cancelled when the client of the `request` has left. Raises Refusal."""

        async def last() -> dict[str, Any]:
            found: dict[str, Any] = {}
            async for event in self.answer(charge, deployment, {**message, "pieces": False}):
                found = event
            return found

        return await unless_gone(request, last())

    async def in_turn(self, key: Key, deployment: Deployment, message: Mapping[str, Any]) -> dict[str, Any]:
        """As `whole`, for a request of a batch: it waits while the model is full, and within its time limit while the
        model is restarting."""
        until = time.monotonic() + message["seconds"]
        while True:
            try:
                return await self.whole(Charge(self.meter, key), deployment, message)
            except Refusal as error:
                wait = WAIT
                if error.kind is not ErrorKind.FULL:
                    wait = min(error.retry_after or WAIT, until - time.monotonic())
                    if error.kind is not ErrorKind.STARTING or wait <= 0:
                        raise
            await asyncio.sleep(wait)


async def _user(request: Request) -> Key:  # a plain function would be called in a thread
    return request.app.state.server.key_of(request, USE)  # type: ignore[no-any-return]


async def _manager(request: Request) -> Key:
    return request.app.state.server.key_of(request, MANAGE)  # type: ignore[no-any-return]


User: TypeAlias = Annotated[Key, Depends(_user)]
Manager: TypeAlias = Annotated[Key, Depends(_manager)]
"""The key of a request, as a parameter of a route."""


def is_trained(told: Mapping[str, Any], adapter: str | None) -> bool:
    """Whether the model, or this adapter of it, was trained on a task (worker.described)."""
    return bool(told["trained"]) or adapter in told["trained_adapters"]


def samples(told: Mapping[str, Any], decoding: Mapping[str, Any]) -> bool:
    """Whether the answers of a task (worker.described) depend on a seed."""
    temperature = {**told["decode"], **decoding}.get("temperature", 0)
    return bool(told["kind"] == "picture" or (told["kind"] == "text" and temperature > 0 and not told["sketch"]))


def left_out(found: Mapping[str, Any]) -> dict[str, int]:
    """The field `truncated` of an answer: the positions of its source that were left out. Empty if none were."""
    return {"truncated": found["truncated"]} if found.get("truncated") else {}


def reasoning_of(found: Mapping[str, Any]) -> dict[str, str]:
    """The field `reasoning` of an answer: what the model wrote before it. Empty if it wrote none."""
    return {"reasoning": found["reasoning"]} if found.get("reasoning") else {}


def highest_cost(about: Mapping[str, Any], message: Mapping[str, Any]) -> int:
    """The highest cost of a request, in tokens: a prompt that fills the model (worker.described), all that the options
    allow, and for label probabilities the prefixes of labels that are read."""
    task = about["tasks"][message["task"]]
    asked = {"max_new_tokens": Decoding().max_new_tokens, **task["decode"], **message["decoding"]}
    row, factors = asked["max_new_tokens"], [asked.get("num_beams")]
    if task["kind"] == "picture":
        row, passes = about["codes"], asked.get("passes") or Drawing().passes
        factors = [message["candidates"], passes, asked.get("branches")]
    most = 2 * row  # with guidance, or in the rounds of a sketch
    for factor in factors:
        most *= min(max(1, factor or 1), 2**20)  # what cannot be is refused later
    told = task["schema"]["outputs"]["properties"] if message["probabilities"] else {}
    labels = [label for output in told.values() for label in output.get("enum", ())]
    if message["probabilities"]:  # the text of a list has more characters than its labels together
        labels += [message["record"].get(slot, "") for slot, kind in task["slots"].items() if kind == "choices"]
    read = sum(len(str(label).encode()) + 1 for label in labels)
    return int(about["positions"] + min(max(0, most), 2**62) + read)

"""The HTTP API: models, tasks, what people's OpenAI clients ask for, health and figures.

GET  /healthz /readyz /metrics
GET  /v1/models /v1/tasks /v1/tasks/{task}
POST /v1/tasks/{task}            any task, by its own slots; pieces as server-sent events with "stream"
POST /v1/tasks/{task}/batch      a file of records, answers line by line
POST /v1/chat/completions /v1/images/generations /v1/images/edits /v1/embeddings    (openai_api.py)
POST /v1/models/{name}/promote /v1/models/{name}/rollback    with a key that manages
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from openm6._version import __version__
from openm6.errors import DataError, OpenM6Error, UsageError, suggest
from openm6.serve.figures import Figures
from openm6.serve.fleet import Deployment, Fleet, Place, Refused
from openm6.serve.guard import Guard, Refusal, add_errors, body_of
from openm6.serve.incoming import Pictures, record_of
from openm6.serve.keys import MANAGE, USE, Key, Keys, Meter
from openm6.serve.wire import CANCELLED

LOCAL = Key("local", "", MANAGE)
"""Who asks where no keys are needed: a server that listens on this machine alone."""


GONE = 0.5
"""Seconds between two looks whether whoever asked is still there."""


@dataclass(frozen=True)
class Options:
    """How the server behaves.

    keys        file of keys (keys.py); None: nobody is asked, for a server on the loopback address
    hosts       from which pictures may be fetched
    body_mib    of a request at most
    seconds     that a request may take, unless it asks for less
    """

    keys: Path | None = None
    hosts: tuple[str, ...] = ()
    body_mib: int = 64
    seconds: float = 300.0
    drain: float = 30.0


class TaskRequest(BaseModel):
    """What a task is asked."""

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any] = Field(default_factory=dict, description="a value for each of the task's slots")
    model: str | None = Field(None, description="a model's name; the first one by default")
    adapter: str | None = Field(None, description="one of the model's adapters")
    decoding: dict[str, int | float] = Field(default_factory=dict, description="options of decoding or drawing")
    examples: list[dict[str, Any]] = Field(default_factory=list, max_length=64, description="records with answers")
    candidates: int = Field(1, ge=1, le=16, description="pictures, the best first")
    stream: bool = Field(False, description="pieces of a text as they are written")
    seconds: float | None = Field(None, gt=0, le=3600, description="after which the request fails")


class PromoteRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    path: str = Field(description="a model directory on the server")
    adapters: dict[str, str] = Field(default_factory=dict)


@dataclass
class Server:
    """What all routes share."""

    fleet: Fleet
    options: Options
    figures: Figures = field(default_factory=Figures)
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.keys = Keys(self.options.keys) if self.options.keys else None
        self.pictures = Pictures(self.options.hosts)

    def key_of(self, request: Request, role: str = USE) -> Key:
        """Whoever asks. Raises Refusal where they may not."""
        if self.keys is None:
            return LOCAL
        given = request.headers.get("authorization", "")
        kind, _, secret = given.partition(" ")
        key = self.keys.find(secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise Refusal(401, "A key is needed: Authorization: Bearer m6-...", "invalid_api_key")
        if not key.may(role):
            raise Refusal(403, f"The key {key.name} may not do that: it takes one with the role {role}.", "forbidden")
        if (seconds := self.meter.wait(key)) > 0:
            raise Refusal(429, f"The key {key.name} has asked as often as it may.", "rate_limit_exceeded", seconds)
        request.state.key = key.name
        return key

    def task(self, deployment: Deployment, name: str) -> dict[str, Any]:
        """What is told of a task. Raises UsageError for one that is not there (a path is none)."""
        tasks: dict[str, dict[str, Any]] = deployment.about["tasks"]
        if name not in tasks:
            raise UsageError(f"The model {deployment.name} has no task {name}.{suggest(name, list(tasks))}")
        return tasks[name]

    async def message(self, deployment: Deployment, task: str, asked: TaskRequest) -> dict[str, Any]:
        """A request as it goes to the worker."""
        slots = self.task(deployment, task)["slots"]
        read = partial(record_of, slots=slots, pictures=self.pictures)
        every = [asked.inputs, *asked.examples]
        if "image" in slots.values():  # it may have to be fetched, or be large
            record, *examples = await asyncio.to_thread(lambda: [read(one) for one in every])
        else:
            record, *examples = [read(one) for one in every]
        return {
            "task": task, "record": record, "decoding": asked.decoding, "adapter": asked.adapter,
            "candidates": asked.candidates, "examples": examples,
            "seconds": min(asked.seconds or self.options.seconds, self.options.seconds),
        }  # fmt: skip

    async def answer(
        self, key: Key, deployment: Deployment, message: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What the worker tells, counted. Raises Refused."""
        started, first = time.perf_counter(), True
        kind = self.task(deployment, message["task"])["kind"]
        status = "cancelled"
        try:
            async with aclosing(self.fleet.ask(deployment.name, message)) as events:
                async for event in events:
                    if first:
                        self.figures.first.labels(kind).observe(time.perf_counter() - started)
                        first = False
                    if "value" in event:
                        tokens = event["tokens"] or _weight(kind, event["value"])
                        self.figures.tokens.labels(kind).inc(tokens)
                        self.meter.spend(key, tokens)
                        status = "ok"
                    yield event
        except Refused as error:
            status = error.kind
            raise
        finally:
            self.figures.requests.labels(kind, status).inc()
            self.figures.seconds.labels(kind).observe(time.perf_counter() - started)

    async def whole(
        self, key: Key, deployment: Deployment, message: Mapping[str, Any], request: Request | None = None
    ) -> dict[str, Any]:
        """The answer alone; cancelled when whoever sent the `request` has gone. Raises Refused."""

        async def last() -> dict[str, Any]:
            found: dict[str, Any] = {}
            async for event in self.answer(key, deployment, message):
                found = event
            return found

        answering = asyncio.ensure_future(last())
        try:
            while request is not None and not (await asyncio.wait({answering}, timeout=GONE))[0]:
                if await request.is_disconnected():
                    raise Refused(CANCELLED, "Whoever asked has gone.")
            return await answering
        finally:
            answering.cancel()


def create_app(fleet: Fleet, options: Options | None = None, places: Mapping[str, Place] | None = None) -> FastAPI:
    """The application; the models of `places` are loaded when it starts."""
    server = Server(fleet, options or Options())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for name, place in (places or {}).items():
            await fleet.deploy(name, place)
        yield
        await fleet.stop(server.options.drain)

    app = FastAPI(title="OpenM6", version=__version__, lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Guard, most=server.options.body_mib * 2**20)
    add_errors(app)
    _routes(app, server)
    from openm6.serve.openai_api import add_routes

    add_routes(app, server)
    return app


def asker(role: str = USE) -> Any:
    """A dependency: the key of whoever asks."""

    async def found(request: Request) -> Key:  # a plain function would be called in a thread
        server: Server = request.app.state.server
        return server.key_of(request, role)

    return Depends(found)


def _routes(app: FastAPI, server: Server) -> None:
    fleet = server.fleet

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> PlainTextResponse:
        ready = fleet.deployments and not fleet.closing
        return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(_: Annotated[Key, asker()]) -> Response:
        return Response(await server.figures.page(fleet), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(_: Annotated[Key, asker()]) -> dict[str, Any]:
        """The models that answer."""
        return {"object": "list", "data": [_model(one) for one in fleet.deployments.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str, _: Annotated[Key, asker()]) -> dict[str, Any]:
        """One of them."""
        return _model(_deployment(fleet, name))

    @app.post("/v1/models/{name}/promote")
    async def promote(name: str, asked: PromoteRequest, _: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """Let another model answer by this name; what is being answered is finished by the one before."""
        place = Place(Path(asked.path), {n: Path(p) for n, p in asked.adapters.items()})
        await _deployment(fleet, name).swap(place)
        return _model(fleet.get(name))

    @app.post("/v1/models/{name}/rollback")
    async def rollback(name: str, _: Annotated[Key, asker(MANAGE)]) -> dict[str, Any]:
        """Let the model before answer again."""
        await _deployment(fleet, name).rollback()
        return _model(fleet.get(name))

    @app.get("/v1/tasks")
    async def tasks(_: Annotated[Key, asker()], model: str | None = None) -> dict[str, Any]:
        """The tasks of a model: what each takes and gives."""
        known = _deployment(fleet, model).about["tasks"]
        return {"object": "list", "data": [{"name": name, **task} for name, task in known.items()]}

    @app.get("/v1/tasks/{task}")
    async def task(task: str, _: Annotated[Key, asker()], model: str | None = None) -> dict[str, Any]:
        """One task, with JSON schemas of its inputs and outputs."""
        return {"name": task, **_task(server, _deployment(fleet, model), task)}

    @app.post("/v1/tasks/{task}", response_model=None)
    async def run(
        task: str, asked: TaskRequest, request: Request, key: Annotated[Key, asker()]
    ) -> dict[str, Any] | StreamingResponse:
        """Ask a task by its own slots. Pictures come and go as base64."""
        deployment = _deployment(fleet, asked.model)
        told = _task(server, deployment, task)
        message = await server.message(deployment, task, asked)
        if asked.stream:
            return await sse(_told_in_pieces(server, key, deployment, message, told))
        return _answer(await server.whole(key, deployment, message, request), told)

    @app.post("/v1/tasks/{task}/batch", response_model=None)
    async def batch(task: str, request: Request, key: Annotated[Key, asker()], model: str | None = None) -> Any:
        """A file of inputs, JSON lines, as the body: answers as JSON lines with the numbers of their lines, each when
        it is there. A line that fails has an error in the place of an answer."""
        deployment = _deployment(fleet, model)
        told = _task(server, deployment, task)
        try:
            lines = (await request.body()).decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise DataError("The file has to be JSON lines in UTF-8.") from None

        async def one(number: int, line: str) -> str:
            try:
                inputs = json.loads(line)
                if not isinstance(inputs, dict):
                    raise DataError("A line has to be a JSON object.")
                message = await server.message(deployment, task, TaskRequest(inputs=inputs))
                found = _answer(await server.whole(key, deployment, message), told)
            except OpenM6Error as error:
                found = {"error": {"message": str(error)}}
            except (ValueError, RecursionError):
                found = {"error": {"message": "The line is no JSON."}}
            return json.dumps({"line": number, **found}, ensure_ascii=False) + "\n"

        return StreamingResponse(_in_any_order(lines, one), media_type="application/x-ndjson")


AT_ONCE = 32
"""Lines of a file that are worked at together."""


async def _in_any_order(lines: list[str], act: Callable[[int, str], Awaitable[str]]) -> AsyncIterator[str]:
    numbered = iter([(number, line) for number, line in enumerate(lines, 1) if line.strip()])
    running: set[asyncio.Task[str]] = set()
    try:
        while True:
            while len(running) < AT_ONCE and (taken := next(numbered, None)):
                running.add(asyncio.ensure_future(act(*taken)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()


def _deployment(fleet: Fleet, name: str | None) -> Deployment:
    try:
        return fleet.get(name)
    except UsageError as error:
        raise Refusal(404, str(error), "model_not_found") from None


def _task(server: Server, deployment: Deployment, name: str) -> dict[str, Any]:
    try:
        return server.task(deployment, name)
    except UsageError as error:
        raise Refusal(404, str(error), "task_not_found") from None


def _model(deployment: Deployment) -> dict[str, Any]:
    about = deployment.about
    return {
        "id": deployment.name, "object": "model", "created": 0, "owned_by": "openm6",
        "parameters": about["parameters"], "adapters": about["adapters"], "restarts": deployment.restarts,
    }  # fmt: skip


def _answer(found: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    value, outputs = outgoing(found["value"]), task["outputs"]
    answer = value if len(outputs) > 1 else {outputs[0]: value}
    if task["kind"] == "picture":
        answer = {outputs[0]: value[0]["image"], "candidates": value}
    usage = {"prompt_tokens": found["prompt_tokens"], "completion_tokens": found["tokens"]}
    return {"outputs": answer, "finished": found["finished"], "usage": usage}


def outgoing(value: Any) -> Any:
    """Bytes (pictures, PNG) as base64, through lists and dicts."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list):
        return [outgoing(one) for one in value]
    if isinstance(value, dict):
        return {name: outgoing(one) for name, one in value.items()}
    return value


def _weight(kind: str, value: Any) -> int:
    """What an answer without tokens counts: a picture its codes, else 1."""
    return sum(len(one["codes"]) for one in value) if kind == "picture" else 1


async def _told_in_pieces(
    server: Server, key: Key, deployment: Deployment, message: Mapping[str, Any], task: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(server.answer(key, deployment, message)) as events:
        async for event in events:
            if event.get("piece"):
                yield {"piece": event["piece"]}
            if "value" in event:
                yield _answer(event, task)


async def sse(events: AsyncIterator[dict[str, Any]], end: str = "") -> StreamingResponse:
    """Server-sent events. What is refused before the first of them is an error of the response itself."""
    first = await anext(events, None)

    async def lines() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield f"data: {json.dumps(first, ensure_ascii=False)}\n\n"
                async for event in events:
                    yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        except Refused as error:
            yield f"data: {json.dumps(body_of(error.kind, str(error)), ensure_ascii=False)}\n\n"
        if end:
            yield f"data: {end}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

"""The HTTP API: models, tasks, health and metrics; with OpenAI's routes (openai_api.py) and the hub's (hub_api.py)."""

from __future__ import annotations

import asyncio
import base64
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import Field
from starlette.middleware.cors import CORSMiddleware

from openm6._version import __version__
from openm6.core.errors import DataError, OpenM6Error
from openm6.core.files import dumps
from openm6.hub.catalogue import find_model
from openm6.serve.bodies import Fields, Route, json_of
from openm6.serve.fleet import Deployment, Fleet
from openm6.serve.guard import Guard, add_errors, body_of, sse, unforeseen
from openm6.serve.hub_api import add_hub
from openm6.serve.listen import Lag
from openm6.serve.meter import Charge
from openm6.serve.openai_api import add_routes
from openm6.serve.server import AT_ONCE, Manager, Options, Server, TaskRequest, User, left_out, reasoning_of
from openm6.serve.wire import Place


class PromoteRequest(Fields):
    path: str = Field(description="a model directory on the server, or one of the catalogue (goods@3)")
    adapters: dict[str, str] = Field(default_factory=dict)


def create_app(
    fleet: Fleet,
    options: Options | None = None,
    places: Mapping[str, Place] | None = None,
    beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
) -> FastAPI:
    """The application. It loads the models of `places` when it starts, and runs the coroutines `beside` until it
    stops."""
    server = Server(fleet, options or Options())
    lag = Lag()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for name, place in (places or {}).items():
            await fleet.deploy(name, place)
        gc.collect()
        gc.freeze()  # else each full collection takes a tenth of a second for objects that stay anyway
        running = [asyncio.create_task(act()) for act in (server.history.follow, lag.follow, *beside)]
        yield
        for one in running:
            one.cancel()
        await fleet.stop(server.options.drain)
        for act in (server.meter.keep, *server.at_end):
            act()

    app = FastAPI(title="OpenM6", version=__version__, lifespan=lifespan)
    app.state.server = server
    app.router.route_class = Route
    limits = server.options
    app.add_middleware(
        Guard, full=lambda: fleet.full or (fleet.busy and lag.is_long), most=limits.body_mib * 2**20,
        loopback=limits.loopback, stopping=lambda: fleet.closing, busy=lambda: fleet.busy,
        texts_only=server.takes_texts_only, lets_in=server.find_key, origins=limits.origins,
        seconds=limits.body_seconds, count=server.figures.answered,
    )  # fmt: skip
    if limits.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=limits.origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"], expose_headers=["*"],
        )  # fmt: skip
    add_errors(app)
    _routes(app, server)
    add_routes(app, server)
    add_hub(app, server)
    return app


def _routes(app: FastAPI, server: Server) -> None:
    fleet = server.fleet

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> PlainTextResponse:
        """Readiness: false while the server starts or stops, or a model's process restarts."""
        why = ""
        if fleet.closing:
            why = "the server is stopping"
        elif not fleet.deployments:
            why = "the models are being loaded"
        elif unready := [name for name, one in fleet.deployments.items() if not one.ready]:
            why = f"{', '.join(unready)} is being started again"
        return PlainTextResponse(f"not ready: {why}" if why else "ready", 503 if why else 200)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(_: User) -> Response:
        return Response(await server.figures.page(fleet), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(_: User) -> dict[str, Any]:
        """All deployed models."""
        return {"object": "list", "data": [_model(one) for one in fleet.deployments.values()]}

    @app.get("/v1/models/{name}")
    async def model(name: str, _: User) -> dict[str, Any]:
        """One deployed model."""
        return _model(fleet.get(name))

    @app.post("/v1/models/{name}/promote")
    async def promote(name: str, asked: PromoteRequest, _: Manager) -> dict[str, Any]:
        """Deploy another model under this name; running requests are finished by the previous one."""
        found = await asyncio.to_thread(find_model, asked.path)
        place = Place(found[0], {n: Path(p) for n, p in asked.adapters.items()})
        await fleet.get(name).swap(place)
        return _model(fleet.get(name))

    @app.post("/v1/models/{name}/rollback")
    async def rollback(name: str, _: Manager) -> dict[str, Any]:
        """Deploy the previous model again."""
        await fleet.get(name).rollback()
        return _model(fleet.get(name))

    @app.get("/v1/tasks")
    async def tasks(_: User, model: str | None = None) -> dict[str, Any]:
        """The tasks of a model, with their inputs and outputs."""
        known = fleet.get(model).about["tasks"]
        return {"object": "list", "data": [{"name": name, **task} for name, task in known.items()]}

    @app.get("/v1/tasks/{task}")
    async def task(task: str, _: User, model: str | None = None) -> dict[str, Any]:
        """One task, with JSON schemas of its inputs and outputs."""
        return {"name": task, **server.task(fleet.get(model), task)}

    @app.post("/v1/tasks/{task}", response_model=None)
    async def run(task: str, asked: TaskRequest, request: Request, key: User) -> JSONResponse | StreamingResponse:
        """Run a task on its slots. Pictures are sent and returned as base64."""
        deployment = fleet.get(asked.model)
        told = server.task(deployment, task)
        message = await server.message(deployment, task, asked)
        charge = Charge(server.meter, key)
        if asked.stream:
            return await sse(_told_in_pieces(server, charge, deployment, message, told), request=request)
        return JSONResponse(_answer(await server.whole(charge, deployment, message, request), told, message))

    @app.post("/v1/tasks/{task}/batch", response_model=None)
    async def batch(
        task: str, request: Request, key: User, model: str | None = None,
        truncate: Literal["start"] | None = None, allow_untrained: bool = False,
    ) -> Any:  # fmt: skip
        """Run a task on a body of JSON lines, an object of inputs each. The response has a JSON line with the line
        number and the answer, or the error, of each, in the order in which they are ready."""
        deployment = fleet.get(model)
        told = server.trained_task(deployment, task, None, allow_untrained)
        lines = (await request.body()).split(b"\n")

        async def one(number: int, line: bytes) -> str:
            try:
                inputs = await json_of(line, "The line")
                if not isinstance(inputs, dict):
                    raise DataError("A line has to be a JSON object.")
                asked = TaskRequest(inputs=inputs, truncate=truncate, allow_untrained=allow_untrained)
                message = await server.message(deployment, task, asked)
                found = _answer(await server.in_turn(key, deployment, message), told, message)
            except OpenM6Error as error:
                found = body_of(error)
            except Exception:
                found = body_of(unforeseen())
            return dumps({"line": number, **found}) + "\n"

        return StreamingResponse(_in_any_order(lines, one), media_type="application/x-ndjson")


async def _in_any_order(lines: list[bytes], act: Callable[[int, bytes], Awaitable[str]]) -> AsyncIterator[str]:
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


def _model(deployment: Deployment) -> dict[str, Any]:
    about = deployment.about
    return {
        "id": deployment.name, "object": "model", "created": 0, "owned_by": "openm6",
        "parameters": about["parameters"], "adapters": about["adapters"], "restarts": deployment.restarts,
        "directory": deployment.place.model.name, "threads": about["threads"], "image_encoder": about["image_encoder"],
        "reproducible": about["reproducible"],
    }  # fmt: skip


def _answer(found: Mapping[str, Any], task: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    value, outputs, more = outgoing(found["value"]), task["outputs"], dict[str, Any]()
    if "seed" in message["decoding"]:
        more["seed"] = message["decoding"]["seed"]
    if isinstance(value, dict) and "probabilities" in value and len(outputs) == 1:  # it was asked for them
        more["probabilities"] = dict(sorted(value["probabilities"].items(), key=lambda pair: -pair[1]))
        value = value["value"]
    answer = value if len(outputs) > 1 else {outputs[0]: value}
    if task["kind"] == "picture":
        answer = {outputs[0]: value[0]["image"], "candidates": value}
        more["uncertain"] = value[0]["uncertain"]
    usage = {"prompt_tokens": found["prompt_tokens"], "completion_tokens": found["tokens"]}
    more |= left_out(found) | reasoning_of(found)
    return {"outputs": answer, "finished": found["finished"], "usage": usage, **more}


def outgoing(value: Any) -> Any:
    """Bytes (pictures, PNG) as base64, through lists and dicts."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list):
        return [outgoing(one) for one in value]
    if isinstance(value, dict):
        return {name: outgoing(one) for name, one in value.items()}
    return value


async def _told_in_pieces(
    server: Server, charge: Charge, deployment: Deployment, message: Mapping[str, Any], task: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(server.answer(charge, deployment, message)) as events:
        async for event in events:
            if "value" not in event and event.get("reasoning"):
                yield reasoning_of(event)
            if event.get("piece"):
                yield {"piece": event["piece"]}
            if "value" in event:
                yield _answer(event, task, message)

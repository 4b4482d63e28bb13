"""Around every request: how large it may be, what is said when it cannot be answered, a line in the log."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from openm6.errors import OpenM6Error, UsageError
from openm6.json_lines import dumps
from openm6.serve.fleet import Refused
from openm6.serve.wire import CANCELLED, DEADLINE, DIED, FULL, INTERNAL, INVALID, MEMORY, STOPPING
from openm6.sites import from_another_site, from_here

log = logging.getLogger("openm6.access")

T = TypeVar("T")

WORK = ("/v1/tasks/", "/v1/chat/", "/v1/images/", "/v1/embeddings")
"""Paths below which a model is asked (POST)."""
AGAIN = 1.0
"""Seconds after which whoever is refused may come again."""

STATUS = {
    INVALID: 400, DEADLINE: 504, MEMORY: 507, FULL: 429, DIED: 503, STOPPING: 503, INTERNAL: 500, CANCELLED: 499,
}  # fmt: skip


class Refusal(OpenM6Error):
    """An error of the API itself."""

    def __init__(self, status: int, message: str, code: str, seconds: float | None = None, param: str | None = None):
        super().__init__(message, code=code, param=param)
        self.status, self.seconds = status, seconds


def known(find: Callable[[Any], T], name: Any, code: str = "not_found") -> T:
    """What is found by a name. Raises Refusal (404) where there is no such."""
    try:
        return find(name)
    except UsageError as error:
        raise Refusal(404, str(error), code) from None


def body_of(code: str, message: str, kind: str = "server_error", param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


def response(
    status: int, code: str, message: str, seconds: float | None = None, param: str | None = None
) -> JSONResponse:
    """An error, and where waiting helps, for how long (`seconds`)."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    wait = seconds if seconds is not None else AGAIN if status in (429, 503) else None
    headers = {"Retry-After": str(max(1, round(wait)))} if wait is not None else {}
    return JSONResponse(body_of(code, message, kind, param), status, headers)


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return response(STATUS.get(error.kind, 500), error.code, str(error), error.seconds, error.param)

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        return response(error.status, error.code, str(error), error.seconds, error.param)

    @app.exception_handler(OpenM6Error)
    async def invalid(_: Request, error: OpenM6Error) -> JSONResponse:
        return response(STATUS[INVALID], error.code, str(error), param=error.param)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        too_large = isinstance(error, _TooLarge)
        return response(error.status_code, "too_large" if too_large else INVALID, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first.get("loc", ())[1:])
        message = f"{place}: {first.get('msg')}" if place else str(first.get("msg"))
        return response(STATUS[INVALID], INVALID, message, param=place or None)


class Guard:
    """Before anything is read: the size of the body, and whether there is room for what is asked (a refusal has to cost
    little, or a server that is asked too much answers less); afterwards a line in the log, without contents and keys.
    """

    def __init__(
        self,
        app: Any,
        most: int,
        full: Callable[[], bool],
        loopback: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ):
        self.app, self.limit, self.full, self.loopback, self.stopping = app, most, full, loopback, stopping

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, seen = time.perf_counter(), {"status": 0, "in": 0, "out": 0}
        identity = uuid.uuid4().hex[:16]

        async def counted() -> Any:
            message = await receive()
            seen["in"] += len(message.get("body", b""))
            if seen["in"] > self.limit:
                raise _TooLarge(self.limit)
            return message

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identity.encode())]}
            seen["out"] += len(message.get("body", b""))
            await send(message)

        try:
            headers = dict(scope["headers"])
            message = ""
            if from_another_site(headers, scope["method"]):
                message = "Pages of other sites may not ask this server."
            elif self.loopback and not from_here(headers):
                message = "Without keys this server answers this machine alone: `openm6 serve --keys FILE`."
            if message:
                await response(403, "forbidden", message)(scope, receive, told)
                return
            works = scope["method"] == "POST" and scope["path"].startswith(WORK)
            if works and self.stopping():
                await response(STATUS[STOPPING], STOPPING, "The server is stopping.")(scope, receive, told)
                return
            if works and self.full():
                await response(429, FULL, "Too many requests wait already.")(scope, receive, told)
                return
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.limit:
                raise _TooLarge(self.limit)
            await self.app(scope, counted, told)
        except _TooLarge as error:
            if not seen["status"]:
                await response(413, "too_large", str(error.detail))(scope, receive, told)
        finally:
            key = scope.get("state", {}).get("key", "")
            log.info(
                json.dumps({
                    "request": identity, "method": scope["method"], "path": scope["path"], "status": seen["status"],
                    "ms": round(1000 * (time.perf_counter() - started), 1), "key": key, "bytes_in": seen["in"],
                    "bytes_out": seen["out"],
                })
            )  # fmt: skip


class _TooLarge(HTTPException):
    def __init__(self, limit: int):
        super().__init__(413, f"A request has at most {limit / 2**20:.0f} MiB.")


async def sse(events: AsyncIterator[dict[str, Any]], end: str = "") -> StreamingResponse:
    """Server-sent events. What is refused before the first of them is an error of the response itself."""
    first = await anext(events, None)

    async def lines() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield f"data: {dumps(first)}\n\n"
                async for event in events:
                    yield f"data: {dumps(event)}\n\n"
        except Refused as error:
            kind = "invalid_request_error" if STATUS.get(error.kind, 500) < 500 else "server_error"
            yield f"data: {dumps(body_of(error.code, str(error), kind, error.param))}\n\n"
        if end:
            yield f"data: {end}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

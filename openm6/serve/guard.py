"""ASGI middleware around every request: early refusals, error responses, and the access log."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from openm6.core.errors import ErrorKind, OpenM6Error, Refusal, UsageError, cut
from openm6.core.files import dumps
from openm6.core.origins import from_another_site, from_here
from openm6.serve.access import LogEntry, current, log, unforeseen
from openm6.serve.validation import fault_of_request

T = TypeVar("T")

API = "/v1/"
WORK = ("/v1/tasks/", "/v1/chat/", "/v1/images/", "/v1/embeddings")
"""Prefixes of the paths of requests to models (POST)."""
PAGES = ("/docs", "/redoc", "/openapi.json")
"""Pages about the API, which need a key as the API does."""

LARGE = 2**20
"""Size, in bytes, above which a body is large. Routes for texts alone accept no large body; elsewhere a busy server
refuses them first, and they are parsed on another thread (bodies.py)."""
OPEN = 512
"""Maximum number of incomplete bodies; beyond it, the one that has been silent for longest is given up."""
HELD = 8
"""Memory for all bodies together, in bodies of the maximum size."""
SLOWEST = 2**14
"""Minimum rate of a body, in bytes a second, after its first seconds."""

GONE = 0.5
"""Seconds between two checks whether the client is still connected."""
LINGER = 1.0
"""Seconds between an answer to an unread body and the end of the connection: if it closed at once, the client's system
would discard the answer."""


class BodyError(HTTPException):
    """A refusal while a body is read. FastAPI hides every other exception that is raised there."""

    def __init__(self, kind: ErrorKind, message: str, code: str | None = None):
        super().__init__(kind.status, message)
        self.error = Refusal(kind, message, code)


def body_of(error: OpenM6Error) -> dict[str, Any]:
    """The body that reports an error, whose code is noted in the log."""
    body, entry = error.body(), current.get()
    if entry is not None:
        entry.code = error.code
        if error.kind is ErrorKind.INTERNAL:
            body["error"]["message"] = f"{str(error).rstrip('.')} (request {entry.request})."
    return body


def response_to(error: OpenM6Error, **headers: str) -> JSONResponse:
    """The response that reports an error."""
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    return JSONResponse(body_of(error), error.kind.status, headers)


def add_errors(app: FastAPI) -> None:
    """Report every error of a route in OpenAI's form."""

    @app.exception_handler(OpenM6Error)
    async def refused(request: Request, error: OpenM6Error) -> JSONResponse:
        fields = getattr(request.state, "fields", {})
        error.param = fields.get(error.param, error.param)
        return response_to(error)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        if isinstance(error, BodyError):
            return response_to(error.error)
        place = f"{request.method} {cut(request.url.path, 200)}"
        if error.status_code == 404:
            return response_to(Refusal(ErrorKind.NOT_FOUND, f"There is no {place} here."))
        if error.status_code != 405:
            return response_to(UsageError(str(error.detail)))
        methods = _methods(app, request)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": methods})
        message = f"There is no {place} here: the methods of this path are {methods}."
        return response_to(Refusal(ErrorKind.METHOD_NOT_ALLOWED, message), Allow=methods)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return response_to(fault_of_request(request, error))


def _methods(app: FastAPI, request: Request) -> str:
    """The methods of a path, for the header Allow."""
    found = {"OPTIONS"}
    for route in app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            found |= set(getattr(route, "methods", None) or ())
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))


class _Body:
    """The progress of a request's body: bytes received, and seconds waited."""

    def __init__(self, headers: dict[bytes, bytes], limit: int):
        length = headers.get(b"content-length", b"")
        self.limit, self.declared = limit, int(length) if length.isdigit() else 0
        self.incomplete = self.declared > 0 or b"transfer-encoding" in headers
        self.bytes, self.waited = 0, 0.0


class Guard:
    """Checks key, origin, size and load before a body is read (a refusal has to be cheap, or an overloaded server
    answers less), and logs each request.

    most        maximum number of bytes of a body
    full        whether no model accepts another request
    loopback    whether only this machine may send requests
    stopping    whether new requests are refused
    busy        whether large bodies are refused in favour of small ones
    texts_only  whether a path accepts neither pictures nor files
    lets_in     raises Refusal for an invalid Authorization
    origins     origins of pages that may use the API
    seconds     maximum number of seconds between two parts of a body
    count       called with the status of each response
    most_open   maximum number of incomplete bodies
    """

    def __init__(
        self, app: Any, most: int, full: Callable[[], bool], loopback: bool = False,
        stopping: Callable[[], bool] = lambda: False, *, busy: Callable[[], bool] = lambda: False,
        texts_only: Callable[[str], bool] = lambda _: False,
        lets_in: Callable[[str], object] = lambda _: None, origins: tuple[str, ...] = (), seconds: float = 10.0,
        count: Callable[[int], None] = lambda _: None, most_open: int = OPEN,
    ):  # fmt: skip
        self.app, self.most, self.full, self.loopback, self.stopping = app, most, full, loopback, stopping
        self.busy, self.texts_only, self.lets_in, self.origins = busy, texts_only, lets_in, origins
        self.seconds, self.count, self.most_open = seconds, count, most_open
        self._held = 0
        self._waiting: dict[_Body, asyncio.Timeout] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, path, headers = time.perf_counter(), scope["path"], dict(scope["headers"])
        entry = LogEntry(scope["method"], path)
        current.set(entry)
        body = _Body(headers, min(self.most, LARGE) if self.texts_only(path) else self.most)
        complete = gone = False
        if entry.method == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves out the body of the answer

        async def counted() -> Any:
            nonlocal gone
            message = await (self._part(body, path, receive) if body.incomplete else receive())
            entry.bytes_in = body.bytes
            gone = gone or (message["type"] == "http.disconnect" and not complete)
            return message

        async def told(message: Any) -> None:
            nonlocal complete
            is_left = body.incomplete and not 0 < body.declared <= LARGE  # the rest of it is not read
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                limits = scope.get("state", {}).get("limits", dict)()  # of the key, after this request
                more = {"x-request-id": entry.request, **limits}
                if is_left or entry.status == 408:
                    more["connection"] = "close"
                headers = [*message["headers"], *((name.encode(), value.encode()) for name, value in more.items())]
                message = {**message, "headers": headers}
            entry.bytes_out += len(message.get("body", b""))
            entry.ms = round(1000 * (time.perf_counter() - started), 1)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            if complete and is_left:
                await send({**message, "more_body": True})
                await asyncio.sleep(LINGER)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._check(scope, headers, body)
            await self.app(scope, counted, told)
        except ClientDisconnect:
            gone = True
        except Exception as error:
            has_begun = bool(entry.status)
            known = error.error if isinstance(error, BodyError) else error
            answer = response_to(known if isinstance(known, Refusal) else unforeseen())
            if not has_begun:
                await answer(scope, receive, told)
        finally:
            self._held -= body.bytes
            if not complete:
                entry.ms = round(1000 * (time.perf_counter() - started), 1)
            entry.status = 499 if gone else entry.status or 500
            entry.key = scope.get("state", {}).get("key", "")
            self.count(entry.status)
            log.info(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **vars(entry)}))

    def _check(self, scope: Any, headers: dict[bytes, bytes], body: _Body) -> None:
        """Raises Refusal or BodyError for a request that is refused unread."""
        path, method = scope["path"], scope["method"]
        if path.startswith(API) and headers.get(b"origin", b"").decode("latin-1") in self.origins:
            headers = {**headers, b"origin": b"", b"sec-fetch-site": b"none"}
        if from_another_site(headers, method):
            raise Refusal(ErrorKind.FORBIDDEN, "Pages of other sites may not use this server.")
        if self.loopback and not from_here(headers):
            why = "Without keys this server answers requests from this machine only: `openm6 serve --keys FILE`."
            raise Refusal(ErrorKind.FORBIDDEN, why)
        if path.startswith((API, *PAGES)):
            self.lets_in(headers.get(b"authorization", b"").decode("latin-1"))
        if (encoding := headers.get(b"content-encoding", b"identity").decode("latin-1").lower()) != "identity":
            why = f"The body is encoded as {cut(encoding)}: send it without Content-Encoding."
            raise Refusal(ErrorKind.UNSUPPORTED_MEDIA_TYPE, why, "unsupported_encoding")
        if method == "POST" and path.startswith(WORK):
            if self.stopping():
                raise Refusal(ErrorKind.STOPPING, "The server is stopping.")
            if self.full():
                raise Refusal(ErrorKind.FULL, "Too many requests are waiting already.")
        if body.declared > body.limit:
            raise _too_large(body)
        if body.declared > LARGE:
            self._check_room(path)

    def _check_room(self, path: str) -> None:
        """Raises BodyError while large bodies are refused."""
        if self._held > HELD * self.most or (path.startswith(WORK) and self.busy()):
            why = f"The server is busy: it accepts no body of more than {LARGE / 2**20:.0f} MiB at the moment."
            raise BodyError(ErrorKind.FULL, why)

    async def _part(self, body: _Body, path: str, receive: Any) -> Any:
        """The next part of a body. Raises BodyError for one that is too large or too slow."""
        begun = time.perf_counter()
        if len(self._waiting) >= self.most_open:
            stalest = self._waiting.pop(next(iter(self._waiting)))
            if not stalest.expired():  # else it is given up already, but its task has not run yet
                stalest.reschedule(0)
        try:
            async with asyncio.timeout(self.seconds + min(0, body.bytes / SLOWEST - body.waited)) as timer:
                self._waiting[body] = timer
                message = await receive()
        except TimeoutError:
            why = f"The body is incomplete: after {body.bytes} bytes nothing, or too little, in {self.seconds:.0f} s."
            raise BodyError(ErrorKind.REQUEST_TIMEOUT, why) from None
        finally:
            self._waiting.pop(body, None)
        was_large = body.bytes > LARGE
        body.waited += time.perf_counter() - begun
        body.bytes += len(message.get("body", b""))
        self._held += len(message.get("body", b""))
        body.incomplete = message.get("more_body", False)
        if body.bytes > body.limit:
            raise _too_large(body)
        if body.bytes > LARGE >= body.declared and not was_large:  # its size was not declared
            self._check_room(path)
        return message


def _too_large(body: _Body) -> BodyError:
    return BodyError(ErrorKind.TOO_LARGE, f"A request to this path has at most {body.limit / 2**20:.0f} MiB.")


async def unless_gone(request: Request | None, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client has left. Raises Refusal (CANCELLED) then."""
    working = asyncio.ensure_future(work)
    try:
        while request is not None and not (await asyncio.wait({working}, timeout=GONE))[0]:
            if await request.is_disconnected():
                raise Refusal(ErrorKind.CANCELLED, "The client has disconnected.")
        return await working
    finally:
        working.cancel()


async def sse(
    events: AsyncIterator[dict[str, Any]], end: str = "", request: Request | None = None
) -> StreamingResponse:
    """Server-sent events. An error before the first event is one of the response itself; until then only `unless_gone`
    notices that the client has left."""

    async def begin() -> dict[str, Any] | None:
        return await anext(events, None)

    first = await unless_gone(request, begin())

    async def lines() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield _event(first)
                async for event in events:
                    yield _event(event)
        except OpenM6Error as error:
            yield _event(body_of(error))
        except Exception:
            yield _event(body_of(unforeseen()))
        if end:
            yield f"data: {end}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(value: Any) -> str:
    """A server-sent event. Raises ValueError for a value that cannot be sent."""
    event = f"data: {dumps(value, allow_nan=False)}\n\n"
    event.encode()  # lone surrogates fail here, and not after the response has begun
    return event

"""The HTTP API of an edge device: tasks as `openm6 serve` has them, with the source of each answer.

GET  /healthz /readyz /metrics /v1/status /v1/tasks /v1/tasks/{task}
POST /v1/tasks/{task}     {"inputs": {...}, "seconds": 1.5, "truncate": "start"}
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from openm6.core.errors import DataError, ErrorKind, OpenM6Error, Refusal, UsageError, cut, suggest
from openm6.core.files import dumps, plain
from openm6.core.images import MAX_BYTES, Features, from_base64
from openm6.core.origins import LOOPBACK, from_another_site, from_here
from openm6.edge.cascade import Cascade
from openm6.edge.cloud import CloudError, is_sendable
from openm6.edge.opening import store_summary
from openm6.edge.status import SERVING, ServiceLock
from openm6.tasks.task import Task

LOG, LOG_BYTES, LOGS = "edge.log", 2**20, 5
"""File of the log, its size before it is rotated, and how many older ones are kept."""
STOPPING = 10
"""Seconds to finish running requests when the device is stopped."""
LARGEST = MAX_BYTES * 4 // 3 + 2**20
TAKEN = ("inputs", "seconds", "truncate", "allow_untrained")
"""Fields of a request. The last one has no effect: an edge device answers every task of its model."""
log = logging.getLogger("openm6.edge")


def serve(cascade: Cascade, host: str, port: int, key: str = "", anyone: bool = False) -> None:
    """Serve until a signal. Raises UsageError for an address that other machines can reach, without a key (unless
    `anyone`), for one where it cannot listen, and where another process serves the device."""
    import uvicorn

    if host not in LOOPBACK and not key and not anyone:
        raise UsageError(
            f"Other machines can reach {host}: name the variable of a key that they need, --key-env NAME, or give "
            "--anyone."
        )
    with closing(ServiceLock(cascade.device.path)) as lock, closing(_listening(host, port)) as listener:
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                log.info("serves at %s: version %s, %s", url, cascade.version, cascade.settings)
                print(f"{cascade.device.path} answers at {url}", flush=True)

        watcher = _Watcher(cascade, url, lock)
        application = make_app(cascade, key, host in LOOPBACK)
        config = uvicorn.Config(
            application, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=STOPPING
        )
        # uvicorn raises the signal once more when all is answered, which would end the process before it is closed.
        signal.signal(signal.SIGTERM, lambda *_: None)
        watcher.start()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                Server(config).run([listener])
        finally:
            watcher.stop()
            cascade.close()
            log.info("stopped")


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{host} cannot listen on port {port} ({reason}): see --host and --port.") from None


def start_log(path: Path) -> None:
    """Log events to edge.log in the device's folder, which is rotated, and warnings to standard error too; never a
    request or an answer."""
    logging.raiseExceptions = False  # a full disk costs lines of the log, and nothing else
    file = RotatingFileHandler(path / LOG, maxBytes=LOG_BYTES, backupCount=LOGS, encoding="utf-8", delay=True)
    stream = logging.StreamHandler()
    stream.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[file, stream], format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)


class _Watcher(threading.Thread):
    """Applies changed settings each second, without requests too; writes the state; reports when that is due."""

    def __init__(self, cascade: Cascade, url: str, lock: ServiceLock):
        super().__init__(daemon=True)
        self._cascade, self._lock, self._stopping = cascade, lock, threading.Event()
        self._about = {"url": url, "process": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._written: dict[str, Any] = {}
        self._write_state()

    def run(self) -> None:
        def check_cloud() -> None:
            for finding in self._cascade.check_cloud():
                if finding.fails:
                    log.warning("%s", finding.line())

        threading.Thread(target=check_cloud, daemon=True).start()
        reported = time.monotonic()
        while not self._stopping.wait(1.0):
            self._write_state()
            minutes = self._cascade.settings.statistics_minutes
            if minutes and time.monotonic() - reported >= 60 * minutes:
                reported = time.monotonic()
                try:
                    self._cascade.report()
                except CloudError as error:
                    log.warning("the counts were not reported to the cloud: %s", error)

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def _write_state(self) -> None:
        now, version = self._cascade.live.follow(), self._cascade.version
        state = {
            **self._about, "version": version, "settings": asdict(now.settings), "problem": now.problem,
            "trouble": now.kept.trouble,
        }  # fmt: skip
        if state != self._written:
            self._written = state
            try:
                self._lock.write_state(state)
            except OSError as error:
                log.warning("%s cannot be written: %s", SERVING, error)


def make_app(cascade: Cascade, key: str = "", loopback: bool = True) -> Starlette:
    """The application. `loopback`: only this machine may use it, by its own name, and no page of another site."""

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(_exposition(cascade), media_type="text/plain; version=0.0.4")

    async def status(_: Request) -> Response:
        now = cascade.live.follow()
        return _json({
            **cascade.statistics(), "kept": store_summary(cascade.device.path, now.kept),
            "drifting": cascade.drifting(), "settings": asdict(now.settings), "problem": now.problem,
        })  # fmt: skip

    async def tasks(_: Request) -> Response:
        return _json({"object": "list", "data": list(map(_describe, cascade.model.tasks.values()))})

    async def describe(request: Request) -> Response:
        return _json(_describe(cascade.model.task(request.path_params["task"])))

    async def ask(request: Request) -> Response:
        body = await _body_of(request)
        task = cascade.model.task(request.path_params["task"])
        record = _record(task, body.get("inputs", {}))
        seconds = body.get("seconds")
        if seconds is not None and (not isinstance(seconds, (int, float)) or seconds <= 0):
            raise UsageError("seconds has to be a number above 0.")
        reply = await anyio.to_thread.run_sync(cascade.answer, task.name, record, seconds, body.get("truncate"))
        return _json({
            "outputs": reply.value if len(task.outputs) > 1 else {task.outputs[0]: reply.value},
            "finished": reply.finished, "by": reply.by,
            "probability": None if reply.probability is None else round(reply.probability, 4), "reason": reply.reason,
            **({"truncated": reply.truncated} if reply.truncated else {}),
        })  # fmt: skip

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Answers are computed on a few cores; those that wait for the cloud take no core.
        anyio.to_thread.current_default_thread_limiter().total_tokens = 16
        yield

    routes = [
        Route("/healthz", health), Route("/readyz", health), Route("/metrics", metrics), Route("/v1/status", status),
        Route("/v1/tasks", tasks), Route("/v1/tasks/{task}", describe),
        Route("/v1/tasks/{task}", ask, methods=["POST"]),
    ]  # fmt: skip
    handlers: Mapping[Any, Callable[..., Any]] = {OpenM6Error: lambda _, error: _response_to(error)}
    guard = Middleware(Guard, key=key, loopback=loopback)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[guard], lifespan=lifespan)


class Guard:
    """Checks origin and key of every request."""

    def __init__(self, app: Any, key: str, loopback: bool):
        self.app, self.key, self.loopback = app, key, loopback

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] not in ("/healthz", "/readyz") and (refusal := self._refusal(dict(scope["headers"]))):
            await _response_to(refusal)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except Exception as error:  # its message, and so uvicorn's log, might repeat what was asked
            places = "; ".join(f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[-5:])
            log.error("a request failed: %s at %s", type(error).__name__, places)
        else:
            return
        with contextlib.suppress(RuntimeError):  # where the answer had begun
            await _response_to(OpenM6Error("The edge device failed at this request: see its log."))(
                scope, receive, send
            )

    def _refusal(self, headers: Mapping[bytes, bytes]) -> Refusal | None:
        if from_another_site(headers) or (self.loopback and not from_here(headers)):
            return Refusal(ErrorKind.FORBIDDEN, "Pages of other sites may not use this edge device.")
        given = headers.get(b"authorization", b"")
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            message = "A key is needed: Authorization: Bearer ..."
            return Refusal(ErrorKind.UNAUTHORIZED, message, "invalid_api_key")
        return None


async def _body_of(request: Request) -> dict[str, Any]:
    """The body of a request. Raises UsageError for an invalid one."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise UsageError(f"A request has at most {LARGEST / 2**20:.0f} MiB.")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("The body has to be JSON.") from None
    if not isinstance(found, dict) or not isinstance(found.get("inputs", {}), dict):
        raise UsageError('The body has to be an object with "inputs", an object too.')
    for name, value in found.items():
        if value and name not in TAKEN:
            raise UsageError(
                f"An edge device takes no {cut(name)}.{suggest(name, TAKEN)} It takes: {', '.join(TAKEN)}.",
                code="unknown_parameter", param=cut(name),
            )  # fmt: skip
    return found


def _record(task: Task, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a request, with pictures as base64, never as paths. Raises DataError or UsageError."""
    record: dict[str, Any] = {}
    for name, value in inputs.items():
        kind = task.slots[name].type if name in task.slots else ""
        if kind == "image" and isinstance(value, str):
            try:
                value = from_base64(value)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
        elif kind == "image" and value is not None and Features.of(value) is None:
            raise UsageError(f"{name}: a picture is given as base64.")
        record[name] = value
    return record


def _describe(task: Task) -> dict[str, Any]:
    return {
        "name": task.name, "description": task.description, "inputs": list(task.inputs), "outputs": list(task.outputs),
        "slots": {name: slot.type for name, slot in task.slots.items()}, "schema": task.schema(),
    }  # fmt: skip


def _json(value: Any, status: int = 200) -> Response:
    return Response(dumps(value, plain), status, media_type="application/json")


def _exposition(cascade: Cascade) -> str:
    """The metrics for Prometheus."""
    lines = ["# TYPE openm6_edge_requests counter", "# TYPE openm6_edge gauge"]
    for task, counts in cascade.statistics()["tasks"].items():
        for name, value in counts.items():
            kind = "openm6_edge_requests_total" if isinstance(value, int) else "openm6_edge"
            lines.append(f'{kind}{{task="{task}",what="{name}"}} {value}')
    kept = store_summary(cascade.device.path, cascade.kept)
    lines += [
        f"openm6_edge_kept_bytes {kept['bytes']}", f"openm6_edge_store_trouble {int(bool(kept['trouble']))}",
        f"openm6_edge_store_set_aside {len(kept['set_aside'])}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _response_to(error: OpenM6Error) -> Response:
    return _json(error.body(), error.kind.status)


def key_of(variable: str) -> str:
    """The key in an environment variable, "" without one. Raises UsageError for a variable that is not set, or whose
    value no header can hold."""
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise UsageError(f"${variable} is not set: it has to hold the key.")
    if not is_sendable(key):
        raise UsageError(f"${variable} has characters that no request can hold, such as the end of a line.")
    return key

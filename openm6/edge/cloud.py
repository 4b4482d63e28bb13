"""The server that a box asks (`openm6 serve`), within a deadline that holds whatever happens on the way."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError as Late
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

AT_ONCE = 8
"""Requests to the cloud that are open at a time; a further one is not made."""
FAILURES = 3
"""Failures one after the other after which the cloud is left alone for a while."""
PAUSES = (2.0, 60.0)
"""Seconds for which it is left alone: at first, and at most (each time twice as long)."""
LARGEST = 64 * 2**20


class Failed(Exception):
    """The cloud gave no answer; the message says why, in a few words."""


class _Wrong(Failed):
    """It answered, but not as asked: it is another version, or has another model. Asking again does not help soon."""


class Cloud:
    """A server at an address. Several threads may ask."""

    def __init__(
        self,
        address: str,
        key: str = "",
        model: str = "",
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], object] = lambda: None,
    ):
        """`check` is called right before a request leaves; it raises Failed where that may not be any more."""
        parts = urlsplit(address)
        self._secure, self._host = parts.scheme == "https", parts.hostname or ""
        self._port, self._prefix = parts.port or (443 if self._secure else 80), parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._model, self._clock, self._check = model, clock, check
        self._pool = ThreadPoolExecutor(AT_ONCE, "cloud")
        self._free = threading.Semaphore(AT_ONCE)
        self._open = threading.local()
        self._lock = threading.Lock()
        self._failures, self._until = 0, 0.0
        self._wrong: dict[str, tuple[float, str]] = {}

    def close(self) -> None:
        """Answers to what has left still come; nothing more leaves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self, task: str, inputs: Mapping[str, Any], seconds: float, late: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """The outputs of a task. Raises Failed when there are none within so many seconds, or the cloud is left alone
        for now; `late` gets an answer that came after that."""
        now = self._clock()
        with self._lock:
            if now < self._until:
                raise Failed("the cloud cannot be reached")
            until, why = self._wrong.get(task, (0.0, ""))
            if now < until:
                raise Failed(why)
        if not self._free.acquire(blocking=False):
            raise Failed("too much is asked of the cloud already")
        body = {"inputs": _outgoing(inputs), "seconds": seconds, **({"model": self._model} if self._model else {})}
        try:
            asking: Future[dict[str, Any]] = self._pool.submit(self._asked, task, body, seconds)
        except RuntimeError:  # it was closed
            self._free.release()
            raise Failed("the settings were changed meanwhile") from None
        asking.add_done_callback(lambda _: self._free.release())
        try:
            found = asking.result(timeout=seconds)
        except CancelledError:
            raise Failed("the settings were changed meanwhile") from None
        except Late:
            self._failed(now)
            if late is not None:
                asking.add_done_callback(
                    lambda done: None if done.cancelled() or done.exception() else late(done.result())
                )
            raise Failed("the cloud took too long") from None
        except _Wrong as error:
            with self._lock:
                self._wrong[task] = now + PAUSES[1], str(error)
            raise
        except Failed:
            self._failed(now)
            raise
        with self._lock:
            self._failures, self._until = 0, 0.0
        return found

    def tell(self, name: str, statistics: Mapping[str, Any], seconds: float = 10.0) -> None:
        """Counts of this box, for whoever runs the cloud. Raises Failed."""
        self._request("POST", f"/v1/edges/{quote(name, safe='')}", dict(statistics), seconds)

    def _failed(self, now: float) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= FAILURES:
                self._until = now + min(PAUSES[1], PAUSES[0] * 2 ** (self._failures - FAILURES))

    def _asked(self, task: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        status, answer = self._request("POST", f"/v1/tasks/{quote(task, safe='')}", body, seconds)
        outputs = answer.get("outputs") if isinstance(answer, dict) else None
        if status == 200 and isinstance(outputs, dict):
            return outputs
        if status in (200, 400, 404, 405, 409, 422):
            told = answer.get("error") if isinstance(answer, dict) else None
            code = told.get("code") if isinstance(told, dict) else None
            raise _Wrong(
                "the cloud's model reads pictures otherwise" if code == "other_eyes"
                else "the cloud does not know the task" if code in ("task_not_found", "model_not_found")
                else "the cloud answers otherwise than expected"
            )  # fmt: skip
        if status in (401, 403):
            raise Failed("the cloud refuses the key")
        raise Failed("the cloud has too much to do" if status in (429, 503) else f"the cloud answered with {status}")

    def _request(self, method: str, path: str, body: Any, seconds: float) -> tuple[int, Any]:
        """An answer's status and what it says; over a connection that is open already, if there is one."""
        data = json.dumps(body, ensure_ascii=False).encode()
        for fresh in (False, True):
            connection = None if fresh else getattr(self._open, "connection", None)
            reused = connection is not None
            try:
                if connection is None:
                    connection = self._connected(seconds)
                connection.sock.settimeout(seconds)
                self._check()
                connection.request(method, self._prefix + path, data, self._headers)
                answer = connection.getresponse()
                content = answer.read(LARGEST)
                self._open.connection = None if answer.will_close else connection
                return answer.status, _read(content)
            except TimeoutError:
                self._open.connection = None
                raise Failed("the cloud took too long") from None
            except (OSError, http.client.HTTPException, ssl.SSLError):
                self._open.connection = None
                if not reused:  # one that was open may have been closed by the other side long ago
                    raise Failed("the cloud cannot be reached") from None
        raise AssertionError

    def _connected(self, seconds: float) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=ssl.create_default_context())
            if self._secure else http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        )  # fmt: skip
        connection.connect()
        return connection


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _outgoing(value: Any) -> Any:
    """Bytes as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {name: _outgoing(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_outgoing(one) for one in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value

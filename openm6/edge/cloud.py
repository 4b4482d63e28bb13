"""The server that a box asks (`openm6 serve`), within a deadline that holds whatever happens on the way."""

from __future__ import annotations

import base64
import http.client
import json
import selectors
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

REASONS = {
    "offline": "offline",
    "privacy": "nothing may be sent",
    "settings": "box.toml cannot be used, so that nothing is sent",
    "changed": "box.toml was changed meanwhile",
    "no_eyes": "the box has not the cloud's eyes, to send features",
    "budget": "this hour's requests to the cloud are used up",
    "crowded": "too much is asked of the cloud already",
    "unreachable": "the cloud cannot be reached",
    "late": "the cloud took too long",
    "key": "the cloud refuses the key",
    "busy": "the cloud has too much to do",
    "error": "the cloud answered with an error",
    "unknown_task": "the cloud does not know the task",
    "other_eyes": "the cloud's model reads pictures otherwise",
    "too_long": "the request is too long for the cloud's model",
    "unexpected": "the cloud answers otherwise than expected",
    "empty": "the cloud's answer is empty",
}
"""Kinds of reasons why the cloud gave no answer, and what people are told. Programs and counts depend on the kind."""
OF_THE_CLOUD = ("unreachable", "late", "key", "busy", "error")
"""Kinds after which all requests wait for a while."""
CHOSEN = ("offline", "privacy", "settings", "changed")
"""Kinds that come from box.toml, of which the log tells when it is taken up."""
OF_A_TASK = ("unknown_task", "other_eyes", "unexpected")
"""Kinds after which the task waits: the cloud is another version, or has another model."""


class Failed(Exception):
    """The cloud gave no answer. `kind` is a key of REASONS; the message says why in a few words."""

    def __init__(self, kind: str, message: str = ""):
        super().__init__(message or REASONS[kind])
        self.kind = kind


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
        self._is_key_sendable = is_sendable(key)
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._model, self._clock, self._check = model, clock, check
        self._pool = ThreadPoolExecutor(AT_ONCE, "cloud")
        self._free = threading.Semaphore(AT_ONCE)
        self._open = threading.local()
        self._lock = threading.Lock()
        self._failures = 0
        self._pauses: dict[str, tuple[float, Failed]] = {}  # by task, "" for all: until when, and why

    def close(self) -> None:
        """Answers to what has left still come; nothing more leaves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self,
        task: str,
        inputs: Mapping[str, Any],
        seconds: float,
        late: Callable[[dict[str, Any]], None] | None = None,
        before: Callable[[], None] | None = None,
        truncate: str | None = None,
    ) -> dict[str, Any]:
        """The cloud's answer to a task: `outputs`, and whether it is `finished`. `truncate`: see `EdgeModel.answer`.

        `late` gets an answer that came after the deadline; `before` is called once a connection is there, right before
        the request leaves, and may raise Failed. Raises Failed when there is no answer within so many seconds, or
        the cloud is left alone for now: then with the reason of its last failure.
        """
        now = self._clock()
        with self._lock:
            for name in ("", task):
                until, why = self._pauses.get(name, (0.0, None))
                if why is not None and now < until:
                    raise Failed(why.kind, str(why))
        if not self._free.acquire(blocking=False):
            raise Failed("crowded")
        body = {"inputs": _outgoing(inputs), "seconds": seconds}
        body |= {name: one for name, one in (("model", self._model), ("truncate", truncate)) if one}
        try:
            asking: Future[dict[str, Any]] = self._pool.submit(self._asked, task, body, seconds, before)
        except RuntimeError:  # it was closed
            self._free.release()
            raise Failed("changed") from None
        asking.add_done_callback(lambda _: self._free.release())
        try:
            found = asking.result(timeout=seconds)
        except CancelledError:
            raise Failed("changed") from None
        except Late:
            if late is not None:
                asking.add_done_callback(
                    lambda done: None if done.cancelled() or done.exception() else late(done.result())
                )
            failure = Failed("late")
            self._failed(task, now, failure)
            raise failure from None
        except Failed as failure:
            self._failed(task, now, failure)
            raise
        with self._lock:
            self._failures = 0
            self._pauses.pop("", None)
        return found

    def tell(self, name: str, statistics: Mapping[str, Any], seconds: float = 10.0) -> None:
        """Counts of this box, for whoever runs the cloud. Raises Failed."""
        self._request("POST", f"/v1/edges/{quote(name, safe='')}", dict(statistics), seconds)

    def read(self, path: str, seconds: float) -> tuple[Any, str]:
        """What is at a path such as /v1/models, and the cloud's date. Raises Failed."""
        return self._request("GET", path, None, seconds)

    def _failed(self, task: str, now: float, failure: Failed) -> None:
        with self._lock:
            if failure.kind in OF_A_TASK:
                self._pauses[task] = now + PAUSES[1], failure
            elif failure.kind in OF_THE_CLOUD:
                self._failures += 1
                if failure.kind == "key":  # asking again does not help soon
                    self._pauses[""] = now + PAUSES[1], failure
                elif self._failures >= FAILURES:
                    seconds = min(PAUSES[1], PAUSES[0] * 2 ** (self._failures - FAILURES))
                    self._pauses[""] = now + seconds, failure

    def _asked(
        self, task: str, body: dict[str, Any], seconds: float, before: Callable[[], None] | None
    ) -> dict[str, Any]:
        answer, _ = self._request("POST", f"/v1/tasks/{quote(task, safe='')}", body, seconds, before)
        if not isinstance(answer, dict) or not isinstance(answer.get("outputs"), dict):
            raise Failed("unexpected")
        return answer

    def _request(
        self, method: str, path: str, body: Any, seconds: float, before: Callable[[], None] | None = None
    ) -> tuple[Any, str]:
        """What an answer holds, and its date; over a connection that is open already, if there is one. Raises Failed
        for every status but 200."""
        if not self._is_key_sendable:  # http.client would raise an error that repeats the key
            raise Failed("key", "the key has characters that cannot be sent, such as the end of a line")
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        for fresh in (False, True):
            connection = None if fresh else self._still_open()
            reused = connection is not None
            try:
                if connection is None:
                    connection = self._connected(seconds)
                connection.sock.settimeout(seconds)
                self._check()
                if before is not None:
                    before()
                    before = None
                connection.request(method, self._prefix + path, data, self._headers)
                answer = connection.getresponse()
                content = _read(answer.read(LARGEST))
                self._open.connection = None if answer.will_close else connection
                break
            except TimeoutError:
                self._open.connection = None
                raise Failed("late") from None
            except (OSError, http.client.HTTPException, ssl.SSLError):
                self._open.connection = None
                if not reused:  # one that was open may have been closed by the other side just now
                    raise Failed("unreachable") from None
        if answer.status != 200:
            raise _failure(answer.status, content)
        return content, answer.getheader("Date", "")

    def _still_open(self) -> http.client.HTTPConnection | None:
        """This thread's connection. One that has something to read before it was asked was closed by the other side."""
        connection: http.client.HTTPConnection | None = getattr(self._open, "connection", None)
        if connection is None:
            return None
        with selectors.DefaultSelector() as ready:
            ready.register(connection.sock, selectors.EVENT_READ)
            if not ready.select(0):
                return connection
        connection.close()
        return None

    def _connected(self, seconds: float) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=ssl.create_default_context())
            if self._secure else http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        )  # fmt: skip
        connection.connect()
        return connection


def is_sendable(key: str) -> bool:
    """Whether a header can hold the key."""
    return key.isascii() and key.isprintable()


def _failure(status: int, content: Any) -> Failed:
    """Why there is no answer, by the status and the code of the error; the words of its message are not looked at."""
    error = content.get("error") if isinstance(content, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if code == "other_eyes":
        return Failed("other_eyes")
    if code in ("task_not_found", "model_not_found"):
        return Failed("unknown_task")
    if code == "context_length_exceeded" or status == 413:
        return Failed("too_long")
    if status in (401, 403):
        return Failed("key")
    if status in (408, 504):
        return Failed("late")
    if status in (429, 503):
        return Failed("busy")
    return Failed("unexpected") if status < 500 else Failed("error", f"the cloud answered with {status}")


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
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

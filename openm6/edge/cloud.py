"""The server to which an edge device defers (`openm6 serve`), within a deadline that holds whatever happens."""

from __future__ import annotations

import base64
import http.client
import json
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError as Late
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from openm6.core.errors import ContextLengthError

AT_ONCE = 8
"""Maximum number of open requests to the cloud; a further one is not made."""
FAILURES = 3
"""Consecutive failures after which requests to the cloud are paused."""
PAUSES = (2.0, 60.0)
"""Seconds of the first pause and of the longest; each pause is twice as long as the one before."""
LARGEST = 64 * 2**20

CHOSEN, BUSY, CLOUD, TASK = "chosen", "busy", "cloud", "task"


class Reason(NamedTuple):
    """Why the cloud gave no answer, in a few words, and what it concerns:

    CHOSEN    edge.toml, a change of which the log reports
    BUSY      this request alone
    CLOUD     every request: after a few of them all requests are paused
    TASK      the task, whose requests are paused: the cloud has another version or another model
    """

    message: str
    concerns: str = BUSY


REASONS = {
    "offline": Reason("offline", CHOSEN),
    "privacy": Reason("nothing may be sent", CHOSEN),
    "settings": Reason("edge.toml cannot be used, so that nothing is sent", CHOSEN),
    "changed": Reason("edge.toml was changed meanwhile", CHOSEN),
    "no_image_encoder": Reason("the device lacks the cloud's image encoder, to send features"),
    "budget": Reason("this hour's requests to the cloud are used up"),
    "crowded": Reason("too many requests to the cloud are open already"),
    "too_long": Reason("the request is too long for the cloud's model"),
    "empty": Reason("the cloud's answer is empty"),
    "unreachable": Reason("the cloud cannot be reached", CLOUD),
    "late": Reason("the cloud took too long", CLOUD),
    "key": Reason("the cloud refuses the key", CLOUD),
    "busy": Reason("the cloud has too much to do", CLOUD),
    "error": Reason("the cloud answered with an error", CLOUD),
    "unknown_task": Reason("the cloud does not know the task", TASK),
    "other_image_encoder": Reason("the cloud's model has another image encoder", TASK),
    "unexpected": Reason("the cloud's answer is not of the expected form", TASK),
}
"""By kind; counts and pauses depend on the kind."""

_BY_CODE = {
    "other_image_encoder": "other_image_encoder", "task_not_found": "unknown_task", "model_not_found": "unknown_task",
    ContextLengthError.code: "too_long",
}  # fmt: skip
_BY_STATUS = {413: "too_long", 401: "key", 403: "key", 408: "late", 504: "late", 429: "busy", 503: "busy"}
"""Kinds of failures by the code of the cloud's error, else by its HTTP status, which a proxy may have given."""


class CloudError(Exception):
    """The cloud gave no answer. `kind` is a key of REASONS; the message says why in a few words."""

    def __init__(self, kind: str, message: str = ""):
        super().__init__(message or REASONS[kind].message)
        self.kind, self.concerns = kind, REASONS[kind].concerns


class Cloud:
    """A server at an address. Several threads may use it."""

    def __init__(
        self,
        address: str,
        key: str = "",
        model: str = "",
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], object] = lambda: None,
    ):
        """`check` is called right before a request is sent; it raises CloudError where that is no longer allowed."""
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
        self._pauses: dict[str, tuple[float, CloudError]] = {}  # by task, "" for all: until when, and why

    def close(self) -> None:
        """Send nothing more; requests that were sent are still answered."""
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

        `late` receives an answer that arrives after the deadline; `before` is called once the connection is open, right
        before the request is sent, and may raise CloudError. Raises CloudError when there is no answer within so many
        seconds, and during a pause: then with the reason of the last failure.
        """
        now = self._clock()
        with self._lock:
            for name in ("", task):
                until, why = self._pauses.get(name, (0.0, None))
                if why is not None and now < until:
                    raise CloudError(why.kind, str(why))
        if not self._free.acquire(blocking=False):
            raise CloudError("crowded")
        body = {"inputs": inputs, "seconds": seconds}
        body |= {name: one for name, one in (("model", self._model), ("truncate", truncate)) if one}
        try:
            asking: Future[dict[str, Any]] = self._pool.submit(self._asked, task, body, seconds, before)
        except RuntimeError:  # it was closed
            self._free.release()
            raise CloudError("changed") from None
        asking.add_done_callback(lambda _: self._free.release())
        try:
            found = asking.result(timeout=seconds)
        except CancelledError:
            raise CloudError("changed") from None
        except Late:
            if late is not None:
                asking.add_done_callback(
                    lambda done: None if done.cancelled() or done.exception() else late(done.result())
                )
            failure = CloudError("late")
            self._failed(task, now, failure)
            raise failure from None
        except CloudError as failure:
            self._failed(task, now, failure)
            raise
        with self._lock:
            self._failures = 0
            self._pauses.pop("", None)
        return found

    def tell(self, name: str, statistics: Mapping[str, Any], seconds: float = 10.0) -> None:
        """Report the counts of this device to the cloud's operator. Raises CloudError."""
        self._request("POST", f"/v1/edges/{quote(name, safe='')}", dict(statistics), seconds)

    def read(self, path: str, seconds: float) -> tuple[Any, str]:
        """The answer at a path such as /v1/models, and the cloud's date. Raises CloudError."""
        return self._request("GET", path, None, seconds)

    def _failed(self, task: str, now: float, failure: CloudError) -> None:
        with self._lock:
            if failure.concerns == TASK:
                self._pauses[task] = now + PAUSES[1], failure
            elif failure.concerns == CLOUD:
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
            raise CloudError("unexpected")
        return answer

    def _request(
        self, method: str, path: str, body: Any, seconds: float, before: Callable[[], None] | None = None
    ) -> tuple[Any, str]:
        """An answer's content and its date, over an open connection if there is one. Raises CloudError for every status
        but 200."""
        if not self._is_key_sendable:  # http.client would raise an error that repeats the key
            raise CloudError("key", "the key has characters that cannot be sent, such as the end of a line")
        data = None if body is None else json.dumps(body, ensure_ascii=False, default=_plain).encode()
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        for fresh in (False, True):
            connection = None if fresh else self._still_open()
            reused = connection is not None
            try:
                if connection is None:
                    connection = kind(self._host, self._port, timeout=seconds)
                    connection.connect()
                connection.sock.settimeout(seconds)
                self._check()
                if before is not None:
                    before()
                    before = None
                connection.request(method, self._prefix + path, data, self._headers)
                answer = connection.getresponse()
                received = answer.read(LARGEST)
                self._open.connection = None if answer.will_close else connection
                break
            except TimeoutError:
                self._open.connection = None
                raise CloudError("late") from None
            except (OSError, http.client.HTTPException):
                self._open.connection = None
                if not reused:  # one that was open may have been closed by the other side just now
                    raise CloudError("unreachable") from None
        content = None
        with suppress(ValueError, RecursionError):
            content = json.loads(received)
        if answer.status != 200:
            raise _failure(answer.status, content)
        return content, answer.getheader("Date", "")

    def _still_open(self) -> http.client.HTTPConnection | None:
        """This thread's connection, unless the cloud has closed it: then it is readable before a request is sent."""
        connection: http.client.HTTPConnection | None = getattr(self._open, "connection", None)
        if connection is None:
            return None
        with selectors.DefaultSelector() as ready:
            ready.register(connection.sock, selectors.EVENT_READ)
            if not ready.select(0):
                return connection
        connection.close()
        return None


def is_sendable(key: str) -> bool:
    """True for a key that a header can hold."""
    return key.isascii() and key.isprintable()


def _failure(status: int, content: Any) -> CloudError:
    """Why there is no answer, by the code of the error and the status; the message is not looked at."""
    error = content.get("error") if isinstance(content, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    kind = _BY_CODE.get(str(code)) or _BY_STATUS.get(status) or ("unexpected" if status < 500 else "error")
    return CloudError(kind, f"the cloud answered with {status}" if kind == "error" else "")


def _plain(value: Any) -> Any:
    """A value for JSON: bytes as base64, mappings as objects, numpy values as numbers and lists."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return dict(value) if isinstance(value, Mapping) else value.tolist()

"""Clients of a server (`openm6 serve`) with the methods of a local model: `run`, `run_many`, `draw` and `stream`.

    m6 = openm6.Client("http://127.0.0.1:8000", key="m6-...")
    m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")

A request that the server refuses for the moment, or that does not reach it, is sent again, after the server's
Retry-After at the earliest.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from openm6.core.errors import INVALID_REQUEST, ContextLengthError, DataError, ErrorKind, OpenM6Error, UsageError
from openm6.core.files import fault_of

if TYPE_CHECKING:
    import httpx2

    from openm6.core.candidates import Candidate

Record: TypeAlias = Mapping[str, Any]

_log = logging.getLogger(__name__)

RETRIED = {502, 504} | {kind.status for kind in ErrorKind if kind.retry_after is not None}
"""HTTP statuses after which a request is sent again; 502 and 504 are those of a proxy whose server is restarting."""
FIRST_WAIT = 0.25
"""Seconds from a failed request to the first retry, at most; each further retry waits twice as long."""
LONGEST_WAIT = 30.0
"""Maximum number of seconds between two tries."""


class ServerError(OpenM6Error):
    """The server could not be reached, or could not answer, after all tries."""


AnswerT = TypeVar("AnswerT")
CandidatesT = TypeVar("CandidatesT")
ListT = TypeVar("ListT")


class _Requests(Generic[AnswerT, CandidatesT, ListT]):
    """All of both clients but the transport: coroutines that make requests from records, repeat them, and read the
    answers. The coroutines of a blocking client never suspend, and its `_result` executes them at once."""

    _transport: str
    _result: Callable[[Coroutine[Any, Any, Any]], Any]
    _sleep: Callable[[float], Awaitable[None]]
    _beside: Callable[[Callable[[], Any]], Awaitable[Any]]
    _send: Callable[[httpx2.Request, bool], Awaitable[httpx2.Response]]

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, *, model: str | None = None,
        timeout: float = 300.0, retries: int = 6, allow_untrained: bool = False,
    ):  # fmt: skip
        import httpx2

        self.url, self.model, self.retries = url.rstrip("/"), model, retries
        self._allow_untrained = allow_untrained
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = getattr(httpx2, self._transport)(base_url=self.url, headers=headers, timeout=timeout)
        self._tasks: dict[str, dict[str, Any]] = {}

    def run(
        self, task: str, *, decoding: Record | None = None, adapter: str | None = None,
        examples: Iterable[Record] = (), truncate: str | None = None, system: str | None = None,
        thinking: bool | None = None, **slots: Any,
    ) -> AnswerT:  # fmt: skip
        """One answer, as `Session.run` returns it: a text, an image (PIL), a vector (numpy), or a dict of several.
        `truncate`, `system` and `thinking` as there. Errors have the server's code."""
        more = {"truncate": truncate, "system": system, "thinking": thinking}
        asking = self._ask(task, slots, decoding, adapter, examples, **more)
        return self._result(self._read(task, asking))  # type: ignore[no-any-return]

    def draw(
        self, task: str, *, candidates: int = 1, decoding: Record | None = None, adapter: str | None = None,
        truncate: str | None = None, **slots: Any,
    ) -> CandidatesT:  # fmt: skip
        """Images for one prompt, the best first, as `Session.draw` returns them."""
        asking = self._ask(task, slots, decoding, adapter, (), candidates=candidates, truncate=truncate)
        return self._result(self._read_candidates(asking))  # type: ignore[no-any-return]

    def tasks(self) -> ListT:
        """The tasks of the model, with their schemas."""
        return self._result(self._read_list("/v1/tasks" + self._query))  # type: ignore[no-any-return]

    def models(self) -> ListT:
        """The models of the server."""
        return self._result(self._read_list("/v1/models"))  # type: ignore[no-any-return]

    @property
    def _query(self) -> str:
        return f"?model={self.model}" if self.model else ""

    async def _ask(
        self, task: str, record: Record, decoding: Record | None, adapter: str | None, examples: Iterable[Record],
        **more: Any,
    ) -> httpx2.Response:  # fmt: skip
        """The response to a task's request; `more`: further fields of it."""
        if "/" in task or "->" in task:
            raise UsageError(f"A server knows tasks by name, and {task!r} is not a name.")
        path = f"/v1/tasks/{task}"
        if task not in self._tasks:
            self._tasks[task] = (await self._request("GET", path + self._query)).json()
        slots = self._tasks[task]["slots"]
        inputs, *shots = await self._beside(lambda: [_outgoing(one, slots) for one in (record, *examples)])
        body = {
            "inputs": inputs, "decoding": dict(decoding or {}), "adapter": adapter, "model": self.model,
            "examples": shots, "allow_untrained": self._allow_untrained or None, **more,
        }  # fmt: skip
        body = {name: value for name, value in body.items() if value not in (None, [], {})}
        return await self._request("POST", path, body, bool(more.get("stream")))

    async def _read(self, task: str, asking: Awaitable[httpx2.Response]) -> Any:
        """The value of a task's one output, or a dict of several."""
        answer = (await asking).json()
        _warn(answer)
        slots, outputs = self._tasks[task]["slots"], self._tasks[task]["outputs"]
        found = {name: _incoming(answer["outputs"].get(name), slots[name]) for name in outputs}
        return found[outputs[0]] if len(outputs) == 1 else found

    async def _read_candidates(self, asking: Awaitable[httpx2.Response]) -> list[Candidate]:
        from openm6.core.candidates import candidates_of

        answer = (await asking).json()
        _warn(answer)
        return candidates_of(answer["outputs"]["candidates"])

    async def _read_list(self, path: str) -> Any:
        return (await self._request("GET", path)).json()["data"]

    async def _request(self, method: str, path: str, body: Any = None, is_stream: bool = False) -> httpx2.Response:
        """The response to a request, which is sent again where that may help; a stream's body is left unread. Raises
        UsageError or ServerError."""
        import httpx2

        for tried in count():
            failure: OpenM6Error
            try:
                answer = await self._send(self._http.build_request(method, path, json=body), is_stream)
            except httpx2.TransportError as error:
                failure, wait = self._unreachable(error), self._wait(tried, "")
            else:
                if answer.status_code < 400:
                    return answer
                failure, wait = _error_in(answer), None
                if answer.status_code in RETRIED:
                    wait = self._wait(tried, answer.headers.get("retry-after", ""))
            if wait is None:
                raise failure
            await self._sleep(wait)
        raise AssertionError

    def _wait(self, tried: int, retry_after: str) -> float | None:
        """Seconds until the next try; None where no try is left, or the server's Retry-After is longer than
        LONGEST_WAIT, as for a key without tokens for the rest of the day."""
        wanted = float(retry_after) if retry_after.replace(".", "", 1).isdigit() else 0.0
        if tried >= self.retries or wanted > LONGEST_WAIT:
            return None
        return max(wanted, min(LONGEST_WAIT, FIRST_WAIT * 2**tried) * random.uniform(0.5, 1))

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(f"{self.url} cannot be reached ({type(error).__name__}): is `openm6 serve` running there?")


class Client(_Requests[Any, "list[Candidate]", list[dict[str, Any]]]):
    """A client of a server's model, which several threads may share. With `allow_untrained` it may also use tasks that
    the model was not trained on, which the server refuses otherwise."""

    _transport = "Client"

    def _result(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            work.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def _beside(self, act: Callable[[], Any]) -> Any:
        return act()

    async def _send(self, request: httpx2.Request, is_stream: bool) -> httpx2.Response:
        answer: httpx2.Response = self._http.send(request, stream=is_stream)
        if answer.is_error:
            answer.read()
        return answer

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_many(
        self, task: str, records: Iterable[Record], *, decoding: Record | None = None, adapter: str | None = None,
        at_once: int = 16, truncate: str | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Answers to many records, in their order; up to `at_once` requests run at the same time."""
        ask = partial(self.run, task, decoding=decoding, adapter=adapter, truncate=truncate)
        with ThreadPoolExecutor(at_once) as pool:
            running: deque[Future[Any]] = deque()
            for record in records:
                running.append(pool.submit(ask, **record))
                if len(running) >= 2 * at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def stream(
        self, task: str, *, decoding: Record | None = None, adapter: str | None = None, truncate: str | None = None,
        **slots: Any,
    ) -> Iterator[str]:  # fmt: skip
        """One text in pieces, as it is written."""
        import httpx2

        answer = self._result(self._ask(task, slots, decoding, adapter, (), stream=True, truncate=truncate))
        try:
            with closing(answer):
                yield from filter(None, map(_piece, answer.iter_lines()))
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None


class AsyncClient(_Requests[Awaitable[Any], Awaitable["list[Candidate]"], Awaitable[list[dict[str, Any]]]]):
    """The client for asyncio: the methods of `Client`, to be awaited."""

    _transport = "AsyncClient"
    _sleep = staticmethod(asyncio.sleep)

    def _result(self, work: Coroutine[Any, Any, Any]) -> Any:
        return work

    async def _beside(self, act: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(act)

    async def _send(self, request: httpx2.Request, is_stream: bool) -> httpx2.Response:
        answer: httpx2.Response = await self._http.send(request, stream=is_stream)
        if answer.is_error:
            await answer.aread()
        return answer

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run_many(
        self, task: str, records: Iterable[Record], *, decoding: Record | None = None, adapter: str | None = None,
        at_once: int = 16, truncate: str | None = None,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """See Client.run_many."""
        ask = partial(self.run, task, decoding=decoding, adapter=adapter, truncate=truncate)
        running: deque[asyncio.Future[Any]] = deque()
        try:
            for record in records:
                running.append(asyncio.ensure_future(ask(**record)))
                if len(running) >= at_once:
                    yield await running.popleft()
            while running:
                yield await running.popleft()
        finally:
            for one in running:
                one.cancel()

    async def stream(
        self, task: str, *, decoding: Record | None = None, adapter: str | None = None, truncate: str | None = None,
        **slots: Any,
    ) -> AsyncIterator[str]:  # fmt: skip
        """See Client.stream."""
        import httpx2

        answer = await self._result(self._ask(task, slots, decoding, adapter, (), stream=True, truncate=truncate))
        try:
            async with aclosing(answer):
                async for line in answer.aiter_lines():
                    if piece := _piece(line):
                        yield piece
        except httpx2.TransportError as error:
            raise self._unreachable(error) from None


def _error_in(answer: httpx2.Response) -> OpenM6Error:
    """The error that a response reports."""
    try:
        return _error(answer.json()["error"], answer.status_code)
    except (ValueError, KeyError, TypeError, AttributeError):
        return _error({"message": f"The server answered with {answer.status_code}."}, answer.status_code)


def _error(body: Mapping[str, Any], status: int) -> OpenM6Error:
    """The error of a body in OpenAI's form; by its type, or for other servers by the status, the caller's mistake
    (UsageError) or the server's."""
    code, is_usage = body.get("code"), status < 500 and status != ErrorKind.FULL.status
    if "type" in body:
        is_usage = body["type"] == INVALID_REQUEST
    kind = ServerError if not is_usage else ContextLengthError if code == ContextLengthError.code else UsageError
    return kind(str(body["message"]), code=code, param=body.get("param"))


def _piece(line: str) -> str:
    """The piece of text in a line of server-sent events; "" where there is none. Raises the error of an error event."""
    if not line.startswith("data: "):
        return ""
    event = json.loads(line[6:])
    if "error" in event:
        raise _error(event["error"], ErrorKind.INTERNAL.status)
    _warn(event)
    return str(event.get("piece", ""))


def _warn(answer: Mapping[str, Any]) -> None:
    if answer.get("truncated"):
        _log.warning(
            "A record is longer than the model takes: %d positions at the beginning of its longest text were left out.",
            answer["truncated"],
        )
    if answer.get("uncertain"):
        from openm6.core.images import UNCERTAIN

        _log.warning(UNCERTAIN)


def _outgoing(record: Record, slots: Mapping[str, str]) -> dict[str, Any]:
    """A record with its images (paths, bytes, PIL images, arrays) as base64. Raises UsageError or DataError for an
    image or text that cannot be sent."""
    found = {}
    for name, value in record.items():
        if slots.get(name) == "image" and value is not None:
            from openm6.core.images import as_file

            try:
                value = base64.b64encode(as_file(value)).decode()
            except DataError as error:
                raise UsageError(str(error)) from None
        elif fault := fault_of(value):
            raise DataError(f"{name} is not a valid text: it {fault}.", param=name)
        found[name] = value
    return found


def _incoming(value: Any, kind: str) -> Any:
    """An output's value as a local model gives it, by the type of its slot."""
    if value is None:
        return None
    if kind == "image":
        from openm6.core.candidates import image_of

        return image_of(value)
    if kind == "vector":
        import numpy as np

        return np.asarray(value, np.float32)
    return value

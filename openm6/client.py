"""A model behind an API, used as one that is here: the same `run`, `run_many`, `draw` and `stream`.

    m6 = openm6.Client("http://127.0.0.1:8000", key="m6-...")
    m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")

What is refused because too many ask, or because the server cannot answer now, is asked again, as late as it says.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from openm6.core.errors import ContextLengthError, DataError, OpenM6Error, UsageError
from openm6.core.files import fault_of

if TYPE_CHECKING:
    import httpx2

    from openm6.core.candidates import Candidate

Record = Mapping[str, Any]

_log = logging.getLogger(__name__)

AGAIN = (429, 502, 503, 504)
"""Answers after which a request is sent again."""
LONGEST = 30.0
"""Seconds between two tries at most."""


class ServerError(OpenM6Error):
    """The server did not answer as it should, after all tries."""

    exit_code = 1


class _Asking:
    """What both clients share: requests made of records, answers read."""

    def __init__(
        self, url: str, key: str | None, model: str | None, timeout: float, retries: int, allow_untrained: bool
    ):
        self.url, self.model, self.retries, self._timeout = url.rstrip("/"), model, retries, timeout
        self._allow_untrained = allow_untrained
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._tasks: dict[str, dict[str, Any]] = {}

    def _place(self, task: str) -> str:
        if "/" in task or "->" in task:
            raise UsageError(f"A server knows tasks by their names: {task!r} is none.")
        return f"/v1/tasks/{task}"

    def _body(
        self, task: str, record: Record, decoding: Record | None, adapter: str | None, examples: Iterable[Record],
        **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        slots = self._tasks[task]["slots"]
        body = {
            "inputs": _outgoing(record, slots), "decoding": dict(decoding or {}), "adapter": adapter,
            "model": self.model, "examples": [_outgoing(one, slots) for one in examples],
            "allow_untrained": self._allow_untrained or None, **more,
        }  # fmt: skip
        return {name: value for name, value in body.items() if value not in (None, [], {})}

    def _read(self, task: str, answer: Mapping[str, Any]) -> Any:
        """As the local model gives it: the value of one output, a dict of several."""
        _warn(answer)
        slots, outputs = self._tasks[task]["slots"], self._tasks[task]["outputs"]
        found = {name: _incoming(answer["outputs"].get(name), slots[name]) for name in outputs}
        return found[outputs[0]] if len(outputs) == 1 else found

    def _candidates(self, answer: Mapping[str, Any]) -> list[Candidate]:
        from openm6.core.candidates import candidates_of

        _warn(answer)
        return candidates_of(answer["outputs"]["candidates"])

    def _wait(self, tried: int, answer: httpx2.Response | None) -> float | None:
        """Seconds until the next try; None when there is none, as where the server asks for more patience than LONGEST
        (a key that has spent its day, a request that ends the model's process)."""
        told = answer.headers.get("retry-after", "") if answer is not None else ""
        wanted = float(told) if told.replace(".", "", 1).isdigit() else 0.0
        if tried >= self.retries or wanted > LONGEST:
            return None
        return max(wanted, min(LONGEST, 0.25 * 2**tried) * random.uniform(0.5, 1))

    @staticmethod
    def _checked(answer: httpx2.Response) -> Any:
        if answer.status_code < 400:
            return answer.json()
        raise _error(answer)


class Client(_Asking):
    """A server's model; several threads may use one client. With `allow_untrained` tasks are asked that the model was
    not trained on, too, which the server refuses otherwise."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, *, model: str | None = None,
        timeout: float = 300.0, retries: int = 6, allow_untrained: bool = False,
    ):  # fmt: skip
        import httpx2

        super().__init__(url, key, model, timeout, retries, allow_untrained)
        self._http = httpx2.Client(base_url=self.url, headers=self._headers, timeout=timeout)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, task: str, *, decoding: Record | None = None, adapter: str | None = None,
        examples: Iterable[Record] = (), truncate: str | None = None, **slots: Any,
    ) -> Any:  # fmt: skip
        """One answer, as `Session.run` gives it: a text, a picture (PIL), a vector (numpy), or a dict of several.
        `truncate` as there, with a warning. Errors have the server's code."""
        self._know(task)
        body = self._body(task, slots, decoding, adapter, examples, truncate=truncate)
        return self._read(task, self._ask("POST", self._place(task), body))

    def draw(
        self, task: str, *, candidates: int = 1, decoding: Record | None = None, adapter: str | None = None,
        truncate: str | None = None, **slots: Any,
    ) -> list[Candidate]:  # fmt: skip
        """Pictures for one wish, the best first, as `Session.draw` gives them."""
        self._know(task)
        body = self._body(task, slots, decoding, adapter, (), candidates=candidates, truncate=truncate)
        return self._candidates(self._ask("POST", self._place(task), body))

    def run_many(
        self, task: str, records: Iterable[Record], *, decoding: Record | None = None, adapter: str | None = None,
        at_once: int = 16, truncate: str | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Answers to many records, in their order, so many asked at the same time."""
        with ThreadPoolExecutor(at_once) as pool:
            running: deque[Future[Any]] = deque()
            for record in records:
                more = {"decoding": decoding, "adapter": adapter, "truncate": truncate, **record}
                running.append(pool.submit(self.run, task, **more))
                if len(running) >= 2 * at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def stream(
        self, task: str, *, decoding: Record | None = None, adapter: str | None = None, truncate: str | None = None,
        **slots: Any,
    ) -> Iterator[str]:  # fmt: skip
        """One text in pieces, as it is written."""
        self._know(task)
        body = self._body(task, slots, decoding, adapter, (), stream=True, truncate=truncate)
        for tried in range(self.retries + 1):
            with self._http.stream("POST", self._place(task), json=body) as answer:
                if answer.status_code < 400:
                    yield from filter(None, map(_piece, answer.iter_lines()))
                    return
                answer.read()
                wait = self._wait(tried, answer) if answer.status_code in AGAIN else None
                if wait is None:
                    self._checked(answer)
            time.sleep(wait or 0)

    def tasks(self) -> list[dict[str, Any]]:
        """What the model can be asked, with schemas."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/tasks" + self._query())["data"]
        return found

    def models(self) -> list[dict[str, Any]]:
        """The models that the server has."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/models")["data"]
        return found

    def _query(self) -> str:
        return f"?model={self.model}" if self.model else ""

    def _know(self, task: str) -> None:
        if task not in self._tasks:
            self._tasks[task] = self._ask("GET", self._place(task) + self._query())

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx2

        tried = 0
        while True:
            answer, reason = None, None
            try:
                answer = self._http.request(method, path, json=body)
            except httpx2.TransportError as error:
                reason = error
            if answer is not None and answer.status_code not in AGAIN:
                return self._checked(answer)
            wait = self._wait(tried, answer)
            if wait is None:
                raise _gone(self.url, reason) if answer is None else _error(answer)
            tried += 1
            time.sleep(wait)


class AsyncClient(_Asking):
    """The same for asyncio."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, *, model: str | None = None,
        timeout: float = 300.0, retries: int = 6, allow_untrained: bool = False,
    ):  # fmt: skip
        import httpx2

        super().__init__(url, key, model, timeout, retries, allow_untrained)
        self._http = httpx2.AsyncClient(base_url=self.url, headers=self._headers, timeout=timeout)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(
        self, task: str, *, decoding: Record | None = None, adapter: str | None = None,
        examples: Iterable[Record] = (), truncate: str | None = None, **slots: Any,
    ) -> Any:  # fmt: skip
        """See Client.run."""
        await self._know(task)
        body = await asyncio.to_thread(self._body, task, slots, decoding, adapter, examples, truncate=truncate)
        return self._read(task, await self._ask("POST", self._place(task), body))

    async def draw(
        self, task: str, *, candidates: int = 1, decoding: Record | None = None, adapter: str | None = None,
        truncate: str | None = None, **slots: Any,
    ) -> list[Candidate]:  # fmt: skip
        """See Client.draw."""
        await self._know(task)
        body = await asyncio.to_thread(
            self._body, task, slots, decoding, adapter, (), candidates=candidates, truncate=truncate
        )
        return self._candidates(await self._ask("POST", self._place(task), body))

    async def run_many(
        self, task: str, records: Iterable[Record], *, decoding: Record | None = None, adapter: str | None = None,
        at_once: int = 16, truncate: str | None = None,
    ) -> AsyncIterator[Any]:  # fmt: skip
        """See Client.run_many."""
        running: deque[asyncio.Task[Any]] = deque()
        try:
            for record in records:
                running.append(
                    asyncio.create_task(self.run(task, decoding=decoding, adapter=adapter, truncate=truncate, **record))
                )
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
        await self._know(task)
        body = self._body(task, slots, decoding, adapter, (), stream=True, truncate=truncate)
        for tried in range(self.retries + 1):
            async with self._http.stream("POST", self._place(task), json=body) as answer:
                if answer.status_code < 400:
                    async for line in answer.aiter_lines():
                        if piece := _piece(line):
                            yield piece
                    return
                await answer.aread()
                wait = self._wait(tried, answer) if answer.status_code in AGAIN else None
                if wait is None:
                    self._checked(answer)
            await asyncio.sleep(wait or 0)

    async def tasks(self) -> list[dict[str, Any]]:
        """See Client.tasks."""
        query = f"?model={self.model}" if self.model else ""
        found: list[dict[str, Any]] = (await self._ask("GET", "/v1/tasks" + query))["data"]
        return found

    async def models(self) -> list[dict[str, Any]]:
        """See Client.models."""
        found: list[dict[str, Any]] = (await self._ask("GET", "/v1/models"))["data"]
        return found

    async def _know(self, task: str) -> None:
        if task not in self._tasks:
            query = f"?model={self.model}" if self.model else ""
            self._tasks[task] = await self._ask("GET", self._place(task) + query)

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx2

        tried = 0
        while True:
            answer, reason = None, None
            try:
                answer = await self._http.request(method, path, json=body)
            except httpx2.TransportError as error:
                reason = error
            if answer is not None and answer.status_code not in AGAIN:
                return self._checked(answer)
            wait = self._wait(tried, answer)
            if wait is None:
                raise _gone(self.url, reason) if answer is None else _error(answer)
            tried += 1
            await asyncio.sleep(wait)


def _gone(url: str, reason: Exception | None) -> ServerError:
    return ServerError(f"{url} cannot be reached ({type(reason).__name__}): is `openm6 serve` running there?")


def _error(answer: httpx2.Response) -> OpenM6Error:
    """The error that a response tells, with its code and the field at fault."""
    try:
        told = answer.json()["error"]
        message, code, param = str(told["message"]), told.get("code"), told.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, param = f"The server answered with {answer.status_code}.", None, None
    if answer.status_code >= 500 or answer.status_code == 429:
        return ServerError(message, code=code, param=param)
    kind = ContextLengthError if code == ContextLengthError.code else UsageError
    return kind(message, code=code, param=param)


def _piece(line: str) -> str:
    """Of a server-sent event. Raises ServerError for one that tells of an error."""
    if not line.startswith("data: "):
        return ""
    event = json.loads(line[6:])
    if "error" in event:
        raise ServerError(event["error"]["message"], code=event["error"].get("code"))
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
    """Pictures as base64: paths, bytes, PIL images, arrays. Raises DataError for what is no text."""
    found = {}
    for name, value in record.items():
        if slots.get(name) == "image" and value is not None:
            value = _encoded(value)
        elif fault := fault_of(value):
            raise DataError(f"{name}: is no text: it {fault}.", param=name)
        found[name] = value
    return found


def _encoded(value: Any) -> str:
    from openm6.core.images import as_file

    try:
        return base64.b64encode(as_file(value)).decode()
    except DataError as error:
        raise UsageError(str(error)) from None


def _incoming(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "image":
        from openm6.core.candidates import image_of

        return image_of(value)
    if kind == "vector":
        import numpy as np

        return np.asarray(value, np.float32)
    return value

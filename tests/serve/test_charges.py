"""What a key is charged by a server: all that was computed for it, however the request ended; and what stops it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from openm6.core.errors import Refusal, UsageError
from openm6.inference.session import Session
from openm6.serve.api import create_app
from openm6.serve.fleet import Fleet
from openm6.serve.keys import Key, Keys
from openm6.serve.meter import Charge
from openm6.serve.server import Options, Server, TaskRequest
from openm6.serve.wire import Place
from openm6.tasks.library import get
from tests.serve.test_api import Served

LONG = {"max_new_tokens": 60, "temperature": 3.0}


@pytest.fixture(scope="module")
def model(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks that are asked here are its own."""
    place = tmp_path_factory.mktemp("model") / "model"
    tasks = [*session.tasks.values(), get("text_to_image"), get("text_vector")]
    Session(session.model, session.processor, tasks).save(place)
    return place


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def served(model: Path, keys: Keys) -> Iterator[Served]:
    keys.add("nobody")
    one = Served({"m6": Place(model)}, Options(keys=keys.path))
    yield one
    one.stop()


numbers = itertools.count()


class Customer:
    """A new key of the server."""

    def __init__(self, served: Served, keys: Keys, **limits: int):
        self.name = f"customer-{next(numbers)}"
        self.server: Server = served.server.config.app.state.server
        self.key = keys.add(self.name, **limits)
        self.url, self.headers = served.url, {"Authorization": f"Bearer {self.key}"}

    def post(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, headers=self.headers, timeout=120, **more)

    def write(self, **more: Any) -> httpx2.Response:
        return self.post("/v1/tasks/write", json={"inputs": {"text": "红色"}, **more})

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    @property
    def spent(self) -> int:
        return self.server.meter.spent(Key(self.name, ""))


@pytest.fixture
def customer(served: Served, keys: Keys) -> Callable[..., Customer]:
    return lambda **limits: Customer(served, keys, **limits)


def settled(one: Customer, most: float = 60) -> int:
    """What is spent when nothing is being worked at any more."""
    until = time.monotonic() + most
    while one.server.meter.reserved(Key(one.name, "")) or one.server.fleet.get(None).worker.unsettled:
        assert time.monotonic() < until
        time.sleep(0.02)
    return one.spent


@pytest.mark.slow
def test_usage_is_what_was_charged(customer: Callable[..., Customer]) -> None:
    one = customer()
    used = one.write(decoding={"num_beams": 64, "max_new_tokens": 4}).json()["usage"]
    assert used["completion_tokens"] >= 64
    assert one.spent == used["prompt_tokens"] + used["completion_tokens"]
    drawn, before = one.openai.images.generate(model="m6", prompt="红色的杯子", n=2), one.spent
    assert drawn.usage.output_tokens > 0 and before == one.spent
    one = customer()
    said = one.openai.chat.completions.create(
        model="m6:write", messages=[{"role": "user", "content": "红色"}], n=3, temperature=1.0, max_tokens=8
    )
    alone = customer().write(decoding={"max_new_tokens": 1}).json()["usage"]
    assert said.usage.prompt_tokens == alone["prompt_tokens"]  # once
    assert one.spent == said.usage.total_tokens
    one = customer()
    texts = ["红", "蓝色的杯子" * 4]
    found = one.openai.embeddings.create(model="m6", input=texts)
    single = [customer().openai.embeddings.create(model="m6", input=text).usage.prompt_tokens for text in texts]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(single) == one.spent


def test_a_stream_that_is_left_is_charged(customer: Callable[..., Customer]) -> None:
    one = customer()
    body = {"inputs": {"text": "红色"}, "decoding": {**LONG, "seed": 3}, "stream": True}
    prompt = one.write(decoding={"max_new_tokens": 1}).json()["usage"]["prompt_tokens"]
    before = one.spent
    with httpx2.stream("POST", f"{one.url}/v1/tasks/write", json=body, headers=one.headers, timeout=60) as response:
        next(line for line in response.iter_lines() if "piece" in line)
    cost = settled(one) - before
    assert prompt < cost <= prompt + 60


@pytest.mark.slow
def test_a_whole_request_that_is_left_is_charged(customer: Callable[..., Customer]) -> None:
    one = customer()
    body = {"inputs": {"caption": "红"}, "decoding": {"passes": 1000, "guidance": 0}}
    with contextlib.suppress(httpx2.TimeoutException):
        httpx2.post(f"{one.url}/v1/tasks/text_to_image", json=body, headers=one.headers, timeout=1)
    assert settled(one) > 16


def test_a_request_that_is_late_is_charged(customer: Callable[..., Customer]) -> None:
    one = customer()
    body = {"inputs": {"caption": "红"}, "decoding": {"passes": 1000, "guidance": 0}}
    found = one.post("/v1/tasks/text_to_image", json={**body, "seconds": 0.3})
    assert found.status_code == 504 and settled(one) > 16


def test_what_is_refused_costs_nothing(customer: Callable[..., Customer]) -> None:
    one = customer()
    assert one.write(decoding={"temprature": 1}).status_code == 400
    assert one.write(decoding={"max_new_tokens": 10_000}).status_code == 400
    assert settled(one) == 0


def test_a_task_that_an_exchanged_model_has_not_is_told_and_reserves_nothing(customer: Callable[..., Customer]) -> None:
    """Between a request's reading and its answer another model may take the place of the one that it was read for."""
    one = customer(per_day=1000)
    message = {"task": "gone", "decoding": {}, "candidates": 1, "probabilities": False, "seconds": 60.0}
    events = one.server.answer(
        Charge(one.server.meter, Key(one.name, "", per_day=1000)), one.server.fleet.get(None), message
    )
    with pytest.raises(UsageError, match="has no task gone"):
        asyncio.run(anext(events))
    assert not one.server.meter.reserved(Key(one.name, ""))


def test_each_text_and_each_line_is_checked_against_what_is_left(customer: Callable[..., Customer]) -> None:
    text = "红色的条纹连衣裙" * 3
    largest = customer().openai.embeddings.create(model="m6", input=text).usage.prompt_tokens
    one = customer(per_day=10)
    with pytest.raises(openai.RateLimitError, match=r"may spend 10 a day"):
        one.openai.embeddings.create(model="m6", input=[text] * 500)
    assert 10 <= settled(one) < 10 + largest
    two = customer(per_day=200)
    lines = two.post("/v1/tasks/write/batch", content="\n".join([json.dumps({"text": text})] * 100).encode()).text
    found = [json.loads(line) for line in lines.splitlines()]
    answers = [line["usage"] for line in found if "outputs" in line]
    refused = [line["error"]["message"] for line in found if "error" in line]
    assert all(line["error"]["type"] == "tokens" for line in found if "error" in line)
    assert len(found) == 100 and answers and refused and all("may spend 200 a day" in one for one in refused)
    costs = [used["prompt_tokens"] + used["completion_tokens"] for used in answers]
    assert two.spent == sum(costs) and 200 <= two.spent < 200 + max(costs)


def test_the_refusal_is_openais(customer: Callable[..., Customer]) -> None:
    """Which limit, what is spent, until when; as an error that the client knows."""
    one = customer(per_minute=1)
    first = one.write(decoding={"max_new_tokens": 2})
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-tokens" not in first.headers
    with pytest.raises(openai.RateLimitError, match="1 requests within a minute") as told:
        one.openai.models.list()
    assert (told.value.type, told.value.code) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
    assert told.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    two = customer(per_day=4)
    used = two.write(decoding={"max_new_tokens": 2})
    assert used.headers["x-ratelimit-limit-tokens"] == "4" and used.headers["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(openai.RateLimitError, match=f"spent {two.spent} tokens today") as told:
        two.openai.chat.completions.create(model="m6:write", messages=[{"role": "user", "content": "红"}])
    assert (told.value.type, told.value.code) == ("tokens", "rate_limit_exceeded")
    until = datetime.fromisoformat(str(told.value).split("again at ")[1][:19] + "+00:00")
    assert (until.hour, until.minute, until.second) == (0, 0, 0)
    with pytest.raises(openai.AuthenticationError) as wrong:
        openai.OpenAI(base_url=f"{one.url}/v1", api_key="m6-wrong", max_retries=0).models.list()
    assert (wrong.value.type, wrong.value.code) == ("invalid_request_error", "invalid_api_key")
    free = customer().write(decoding={"max_new_tokens": 2})
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


@pytest.mark.slow
def test_what_is_asked_again_after_a_death_is_charged_once(model: Path, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.add("shop")

    async def run() -> None:
        fleet = Fleet()
        server: Server = create_app(fleet, Options(keys=keys.path)).state.server
        deployment = await fleet.deploy("m6", Place(model))
        asked = TaskRequest(inputs={"text": "红色"}, decoding={**LONG, "seed": 11})
        message, key = await server.message(deployment, "write", asked), Key("shop", "")
        last: dict[str, Any] = {}
        async for event in server.answer(Charge(server.meter, key), deployment, message):
            if not last:
                os.kill(deployment.worker.process.pid, signal.SIGKILL)
            last = event
        assert deployment.restarts == 1 and last["tokens"] > 1
        assert server.meter.spent(key) == last["prompt_tokens"] + last["tokens"]
        twice = server.answer(Charge(server.meter, key), deployment, message)
        before = server.meter.spent(key)
        with pytest.raises(Refusal, match="ended"):
            async for _ in twice:
                os.kill(deployment.worker.process.pid, signal.SIGKILL)
        assert before < server.meter.spent(key) <= before + last["prompt_tokens"] + last["tokens"]
        await fleet.stop()

    asyncio.run(run())

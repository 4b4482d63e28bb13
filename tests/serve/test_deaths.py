"""Processes that die in the midst of work: whose answers go on, who is told what, and when the next one is there."""

from __future__ import annotations

import asyncio
import copy
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from openm6.core.environment import EXTENSIONS
from openm6.core.errors import Refusal
from openm6.inference.session import Session
from openm6.serve.fleet import Deployment, Fleet
from openm6.serve.server import Options
from openm6.serve.wire import Place
from tests.serve.test_api import Served
from tests.serve.test_fleet import answer, writing

pytestmark = pytest.mark.slow

POISON = "毒"
EXTENSION = f'''
import os, signal, threading
import openm6.serve.engine as engine

prepare = engine.prepare

def deadly(request, view):
    prepare(request, view)
    if "{POISON}" in str(request.request.record):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()

engine.prepare = deadly
'''
"""Kills its process a moment after a text with this character has come, when others are being written too."""


@pytest.fixture
def model(session: Session, tmp_path: Path) -> Path:
    session.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def alone(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The text of a seed that the model writes without a server."""
    place = tmp_path_factory.mktemp("alone") / "model"
    session.save(place)
    loaded = Session.load(place)
    return cache(lambda seed: loaded.run("write", text="红色", decoding=sampled(seed)["decoding"]))


def kill(deployment: Deployment) -> None:
    assert deployment.worker is not None
    os.kill(deployment.worker.process.pid, signal.SIGKILL)


async def until(true: Any) -> None:
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.02)


def sampled(seed: int) -> dict[str, Any]:
    return {**writing(temperature=1.0, seed=seed, max_new_tokens=200)}


async def told(events: Any, seen: list[str] | None = None) -> tuple[str, Any]:
    """What a client has of a stream, and the value or the error at its end; pieces are `seen` as they come."""
    pieces, end = list[str](), None
    try:
        async for event in events:
            pieces.append(event.get("piece", ""))
            if seen is not None:
                seen.append(pieces[-1])
            end = event.get("value")
    except Refusal as error:
        end = error
    return "".join(pieces), end


def test_sampled_texts_go_on_as_they_were_begun(model: Path, alone: Callable[[int], str]) -> None:
    """Killed at any time, and asked again among others than before."""

    async def run() -> None:
        fleet, chance = Fleet(), random.Random(0)
        deployment = await fleet.deploy("m6", Place(model))
        for first in range(0, 24, 12):
            streams = [asyncio.create_task(told(fleet.ask("m6", sampled(seed)))) for seed in range(first, first + 12)]
            await asyncio.sleep(0.05 + 0.2 * chance.random())
            kill(deployment)
            for seed, stream in enumerate(streams, first):
                text, end = await stream
                expected = alone(seed)
                if isinstance(end, Refusal):
                    assert end.code == "answer_changed" and expected.startswith(text)
                else:
                    assert text == end == expected
            await until(lambda first=first: deployment.restarts == first // 12 + 1 and deployment.ready)
        await fleet.stop()

    asyncio.run(run())


def test_a_stream_ends_with_an_error_where_the_next_process_answers_otherwise(
    session: Session, model: Path, alone: Callable[[int], str]
) -> None:
    """Its model was exchanged on disk meanwhile: the head of one answer and the tail of another are no answer."""

    other = Session(copy.deepcopy(session.model), session.processor, list(session.tasks.values()))
    with torch.no_grad():
        other.model.embed.weight.copy_(other.model.embed.weight.flip(0))
    other.save(model.with_name("other"))

    async def run() -> None:
        fleet, seen = Fleet(), list[str]()
        deployment = await fleet.deploy("m6", Place(model))
        streams = [asyncio.create_task(told(fleet.ask("m6", sampled(seed)), seen)) for seed in range(12)]
        await until(lambda: len(seen) > 60)
        model.rename(model.with_name("before"))
        model.with_name("other").rename(model)
        kill(deployment)
        changed, now = 0, Session.load(model)
        for seed, (text, end) in enumerate(await asyncio.gather(*streams)):
            answers = [alone(seed), now.run("write", text="红色", decoding=sampled(seed)["decoding"])]
            if isinstance(end, Refusal):
                assert (end.kind, end.code) == ("died", "answer_changed")
                assert any(answer.startswith(text) for answer in answers)
                changed += 1
            else:
                assert text == end and text in answers
        assert changed
        await fleet.stop()

    asyncio.run(run())


def test_a_request_that_kills_its_process_takes_nobody_along(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Callable[[int], str]
) -> None:
    """Those beside it and those that come meanwhile are answered; the same request is not tried again."""
    (tmp_path / "deadly.py").write_text(EXTENSION, "utf-8")
    monkeypatch.setenv(EXTENSIONS, str(tmp_path / "deadly.py"))

    async def run() -> None:
        fleet = Fleet()
        deployment = await fleet.deploy("m6", Place(model))
        beside = [asyncio.create_task(answer(fleet.ask("m6", sampled(seed)))) for seed in range(16)]
        poison = asyncio.create_task(told(fleet.ask("m6", writing(POISON, max_new_tokens=200))))
        while not poison.done():
            beside.append(asyncio.create_task(answer(fleet.ask("m6", sampled(len(beside))))))
            await asyncio.sleep(0.5)
        _, error = await poison
        assert isinstance(error, Refusal) and error.kind == "died"
        for seed, found in enumerate(await asyncio.gather(*beside)):
            assert found == (alone(seed),) * 2
        restarts = deployment.restarts
        assert 2 <= restarts <= 3
        with pytest.raises(Refusal, match="ended each time") as again:
            await answer(fleet.ask("m6", writing(POISON, max_new_tokens=200)))
        assert again.value.retry_after > 1
        await until(lambda: deployment.ready)
        assert deployment.restarts == restarts and (await answer(fleet.ask("m6", writing())))[1]
        await fleet.stop()

    asyncio.run(run())


@pytest.fixture
def served(model: Path) -> Iterator[Served]:
    one = Served({"m6": Place(model)}, Options())
    yield one
    one.stop()


def ask(served: Served, text: str = "红色") -> httpx2.Response:
    body = {"inputs": {"text": text}, "decoding": {"max_new_tokens": 8}}
    return httpx2.post(f"{served.url}/v1/tasks/write", json=body, timeout=60)


def wait_ready(served: Served, ready: bool) -> str:
    while (found := httpx2.get(f"{served.url}/readyz")).is_success is not ready:
        assert served.thread.is_alive()
        time.sleep(0.02)
    return found.text


def test_a_model_is_started_again_when_its_process_dies_and_not_when_it_is_asked(served: Served) -> None:
    deployment = served.fleet.get("m6")
    kill(deployment)
    assert "m6" in wait_ready(served, False)
    assert httpx2.get(f"{served.url}/healthz").status_code == 200
    assert ask(served).status_code == 200  # it waits for the next process
    assert wait_ready(served, True) == "ready" and deployment.restarts == 1
    kill(deployment)
    wait_ready(served, False)
    wait_ready(served, True)  # though nobody asks


def test_while_a_model_cannot_be_started_requests_are_refused_without_a_path(served: Served, model: Path) -> None:
    """And it is started again as soon as it can be."""
    assert ask(served).status_code == 200
    batch = "".join(f'{{"text": "红{number}"}}\n' for number in range(40))
    hidden = model.rename(model.with_name("hidden"))
    kill(served.fleet.get("m6"))
    refused = ask(served)
    while refused.status_code == 200:
        refused = ask(served)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "starting"
    assert int(refused.headers["retry-after"]) >= 1
    for page in (refused, httpx2.get(f"{served.url}/readyz"), httpx2.get(f"{served.url}/v1/models")):
        assert str(model.parent) not in page.text
    with httpx2.stream("POST", f"{served.url}/v1/tasks/write/batch", content=batch.encode(), timeout=120) as lines:
        hidden.rename(model)  # the lines of a batch wait for it
        answers = [line for line in lines.iter_lines() if line]
    assert len(answers) == 40 and not any("error" in line for line in answers)
    assert wait_ready(served, True) == "ready" and ask(served).status_code == 200


def test_a_server_stops_although_a_model_cannot_be_started(model: Path) -> None:
    async def run() -> None:
        fleet = Fleet()
        deployment = await fleet.deploy("m6", Place(model))
        shutil.rmtree(model)
        stream = asyncio.create_task(told(fleet.ask("m6", sampled(0))))
        await asyncio.sleep(0.05)
        kill(deployment)
        _, error = await stream
        assert isinstance(error, Refusal) and error.code == "starting"
        await fleet.stop(1.0)
        assert not deployment.ready

    asyncio.run(run())

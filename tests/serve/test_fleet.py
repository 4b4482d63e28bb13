"""Processes that answer: asked at once, killed in the midst, exchanged, stopped."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from openm6.core.errors import Refusal, UsageError
from openm6.inference.session import Session
from openm6.serve.fleet import Fleet
from openm6.serve.wire import Place
from tests.tasks.conftest import picture


@pytest.fixture(scope="module")
def saved(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "model"
    session.save(place)
    return place


async def answer(events: AsyncIterator[dict[str, Any]]) -> tuple[str, Any]:
    """The pieces together, and the value."""
    text, value = "", None
    async for event in events:
        text += event.get("piece", "")
        value = event.get("value", value)
    return text, value


def writing(text: str = "红色", **decoding: Any) -> dict[str, Any]:
    return {"task": "write", "record": {"text": text}, "decoding": {"max_new_tokens": 12, **decoding}}


@pytest.mark.slow
def test_a_process_answers_all_kinds(session: Session, saved: Path) -> None:
    async def run() -> None:
        fleet = Fleet()
        await fleet.deploy("m6", Place(saved))
        kinds = [
            writing(), {"task": "kind", "record": {"photo": picture()}},
            {"task": "text_vector", "record": {"text": "红"}},
            {"task": "text_to_image", "record": {"caption": "红"}, "decoding": {"passes": 2, "guidance": 0.0}},
        ]  # fmt: skip
        found = await asyncio.gather(*(answer(fleet.ask("m6", kind)) for kind in kinds))
        assert found[0] == (session.run("write", text="红色", decoding={"max_new_tokens": 12}),) * 2
        assert found[1][1] == session.run("kind", photo=picture())
        assert len(found[2][1]) == 32 and found[3][1][0]["image"][:4] == b"\x89PNG"
        with pytest.raises(Refusal, match="no slot wrong"):
            await answer(fleet.ask("m6", {"task": "write", "record": {"wrong": "x"}}))
        with pytest.raises(UsageError, match="There is no model m7"):
            fleet.ask("m7", writing())
        state = await fleet.get(None).worker.state()
        assert state["answered"] == 4 and state["waiting"] == 0
        await fleet.stop()
        with pytest.raises(Refusal, match="stopping"):
            fleet.ask("m6", writing())

    asyncio.run(run())


@pytest.mark.slow
def test_who_is_killed_is_replaced_and_nobody_is_left_without_an_answer(saved: Path) -> None:
    """Texts that were begun go on where they were: nothing comes twice."""

    async def run() -> None:
        fleet, chance = Fleet(), random.Random(0)
        deployment = await fleet.deploy("m6", Place(saved))
        outcomes = []

        async def one(number: int) -> None:
            await asyncio.sleep(chance.random() * 5)
            decoding = {"temperature": 1.0, "seed": number, "max_new_tokens": 60}
            try:
                outcomes.append((number, *await answer(fleet.ask("m6", writing(**decoding)))))
            except Refusal as error:
                assert error.kind == "died"  # of two processes, one after the other
                outcomes.append((number, None, None))

        async def killer() -> None:
            for _ in range(2):
                await asyncio.sleep(0.5 + chance.random())
                if deployment.worker.alive:
                    os.kill(deployment.worker.process.pid, signal.SIGKILL)
                while not deployment.worker.alive or deployment.worker.process.poll() is not None:
                    await asyncio.sleep(0.05)

        await asyncio.gather(killer(), *(one(number) for number in range(40)))
        assert len(outcomes) == 40 and deployment.restarts >= 1
        alone = Session.load(saved)
        good = [(number, text, value) for number, text, value in outcomes if value is not None]
        assert len(good) > 20
        for number, text, value in good:
            decoding = {"temperature": 1.0, "seed": number, "max_new_tokens": 60}
            assert text == value == alone.run("write", text="红色", decoding=decoding)
        await fleet.stop()

    asyncio.run(run())


@pytest.mark.slow
def test_a_model_is_exchanged_without_a_lost_request(saved: Path) -> None:
    async def run() -> None:
        fleet = Fleet()
        deployment = await fleet.deploy("m6", Place(saved))
        first = deployment.worker
        asking, done = True, []

        async def client() -> None:
            while asking:
                done.append(await answer(fleet.ask("m6", writing(max_new_tokens=30))))

        clients = [asyncio.create_task(client()) for _ in range(4)]
        await asyncio.sleep(0.5)
        await deployment.swap(Place(saved))
        assert deployment.worker is not first
        await asyncio.sleep(0.5)
        await deployment.rollback()
        asking = False
        await asyncio.gather(*clients)
        assert len(done) > 4 and len(set(done)) == 1
        await fleet.stop()
        assert first.process.poll() == 0

    asyncio.run(run())


@pytest.mark.slow
def test_what_cannot_be_loaded_is_told(tmp_path: Path, saved: Path) -> None:
    async def run() -> None:
        fleet = Fleet()
        with pytest.raises(UsageError):
            await fleet.deploy("m6", Place(tmp_path / "nowhere"))
        deployment = await fleet.deploy("m6", Place(saved))
        with pytest.raises(UsageError):
            await fleet.deploy("m6", Place(tmp_path / "nowhere"))
        assert (await answer(fleet.ask("m6", writing())))[1]  # the one that was there still answers
        with pytest.raises(UsageError, match="no earlier model"):
            await deployment.rollback()
        await fleet.stop()

    asyncio.run(run())


@pytest.mark.slow
def test_whoever_stops_listening_has_it_cancelled(saved: Path) -> None:
    async def run() -> None:
        fleet = Fleet()
        deployment = await fleet.deploy("m6", Place(saved))
        events = fleet.ask("m6", writing(max_new_tokens=200, temperature=3.0))
        await anext(events)
        await events.aclose()
        while (state := await deployment.worker.state())["running"] or state["waiting"]:
            await asyncio.sleep(0.01)
        assert state["cancelled"] + state["answered"] == 1
        await fleet.stop()

    asyncio.run(run())

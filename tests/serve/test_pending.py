"""Which requests a process works at together after another one died, without any process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from hypothesis import given, settings, strategies as st

from openm6.serve.fleet import LONGEST_PAUSE, pause_after
from openm6.serve.process import ALONE, SUSPECTS, PendingRequest, PendingRequests


def request(name: str, **message: Any) -> PendingRequest:
    return PendingRequest(name, {"record": {"text": name}, **message})


def worked_at(pending: PendingRequests, deadly: Callable[[Collection[PendingRequest]], bool], most: int) -> list[str]:
    """Let processes work at what waits, as many as may at a time; the one that ends first is the last that was sent.
    Returns the names of those that were answered, after `most` deaths at most."""
    answered, deaths, running = list[str](), 0, list[PendingRequest]()
    while pending.waiting or running:
        while (one := pending.next(running)) is not None:
            running.append(one)
        assert running, "nothing may be sent, and nothing is worked at"
        if deadly(running):
            deaths += 1
            assert deaths <= most
            pending.survive(running)
            running = []
        else:
            answered.append(running.pop().identity)
    return answered


@given(st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=50)
def test_only_the_request_at_fault_fails(number: int, data: st.DataObject) -> None:
    async def run() -> None:
        pending, every = PendingRequests(), [request(f"r{i}") for i in range(number)]
        poison = {f"r{i}" for i in data.draw(st.sets(st.integers(0, number - 1), max_size=4))}
        for one in every:
            pending.add(one)
        answered = worked_at(
            pending, lambda running: any(one.identity in poison for one in running), most=3 * max(1, len(poison))
        )
        assert sorted(answered) == sorted({one.identity for one in every} - poison)
        for one in every:
            events = [one.events.get_nowait() for _ in range(one.events.qsize())]
            failed = [event for event in events if "error" in event]
            assert [event["error"] for event in failed] == ["died"] * (one.identity in poison)

    asyncio.run(run())


def test_suspects_leave_room_for_new_requests_until_one_of_them_has_met_two_deaths() -> None:
    async def run() -> None:
        pending, suspects = PendingRequests(), [request(f"old{i}") for i in range(20)]
        pending.survive(suspects)
        new = [request(f"new{i}") for i in range(3)]
        for one in new:
            pending.add(one)
        running = list[PendingRequest]()
        while (one := pending.next(running)) is not None:
            running.append(one)
        assert running == suspects[:SUSPECTS] + new
        pending.survive(running)
        alone = pending.next([])
        assert alone is suspects[0] and alone.deaths == ALONE
        assert pending.next([alone]) is None

    asyncio.run(run())


def test_a_single_death_is_nobodys_fault() -> None:
    """As when somebody kills a process that works at one request."""

    async def run() -> None:
        pending, one = PendingRequests(), request("a")
        pending.survive([one])
        assert one.events.get_nowait() == {"again": True} and pending.next([]) is one

    asyncio.run(run())


def test_the_same_request_is_not_let_in_again_whatever_its_seed() -> None:
    async def run() -> None:
        pending = PendingRequests()
        asked = {"task": "write", "record": {"text": "红"}, "decoding": {"seed": 1, "temperature": 1.0}, "seconds": 9}
        one = PendingRequest("a", asked)
        assert not pending.refused_for(asked)
        pending.survive([one])
        pending.survive([one])
        assert pending.refused_for({**asked, "decoding": {"temperature": 1.0, "seed": 2}, "seconds": 7}) > 1
        assert not pending.refused_for({**asked, "decoding": {"temperature": 0.5, "seed": 1}})
        assert not pending.refused_for({**asked, "record": {"text": "蓝"}})

    asyncio.run(run())


def test_a_request_waits_until_its_deadline() -> None:
    async def run() -> None:
        pending, one, other = PendingRequests(), request("a", seconds=0.01), request("b")
        pending.add(one)
        pending.add(other)
        assert (await one.next_event())["error"] == "deadline"
        assert pending.waiting == [other]

    asyncio.run(run())


@given(st.text(max_size=12), st.text(max_size=12), st.data())
@settings(deadline=None)
def test_a_text_goes_on_as_it_was_begun_or_ends_with_an_error(first: str, second: str, data: st.DataObject) -> None:
    """Never the head of one text and the tail of another, however both are cut into pieces."""

    def pieces(text: str) -> list[str]:
        places = sorted(data.draw(st.sets(st.integers(0, len(text)))))
        return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]

    async def run() -> None:
        one = request("a")
        for piece in pieces(first):
            one.events.put_nowait({"piece": piece})
        one.events.put_nowait({"again": True})
        for piece in pieces(second):
            one.events.put_nowait({"piece": piece})
        one.events.put_nowait({"value": second})
        told, event = "", dict[str, Any]()
        while "value" not in event and "error" not in event:
            event = await one.next_event()
            told += event.get("piece", "")
        if second.startswith(first):
            assert told == event["value"] == second
        else:
            assert event["code"] == "answer_changed" and first.startswith(told[: len(first)])
            assert told[: len(first)] == first

    asyncio.run(run())


def test_pauses_between_starts_grow_and_are_bounded() -> None:
    assert [pause_after(deaths) for deaths in range(1, 7)] == [0, 1, 2, 4, 8, 16]
    assert pause_after(1000) == LONGEST_PAUSE

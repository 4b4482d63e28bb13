"""What goes wrong for one request, and what comes out of order, does not reach the others."""

from __future__ import annotations

import time
from collections import UserDict
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from openm6.inference.session import Session
from openm6.model.cache import fill, prefill, step
from openm6.serve.engine import EARLY
from openm6.serve.slots import Slots
from tests.serve.conftest import Watched

TEXTS = ["红色", "蓝色的杯子", "条纹连衣裙，红色条纹"]
SAMPLED = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}


def test_texts_that_fail_together_are_written_one_by_one(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of several texts fails, always: each goes on by itself and has its answer; whose own step fails, fails."""
    broken: set[int] = set()

    def one_alone(model: Any, tokens: Any, cache: Any, **more: Any) -> Any:
        if len(cache.counts) > 1 or broken.intersection(cache.counts):
            raise RuntimeError("a kernel fails")
        return step(model, tokens, cache, **more)

    expected = [session.run("write", decoding=SAMPLED, text=text) for text in TEXTS]
    watched = Watched(session)
    asked = [watched.ask(str(number), "write", text=text, decoding=SAMPLED) for number, text in enumerate(TEXTS)]
    lengths = [len(one.ready().prompt) for one in asked]
    watched.engine.step()
    monkeypatch.setattr("openm6.serve.slots.step", one_alone)
    watched.engine.step()
    broken.add(lengths[0] + 1)  # positions of the shortest, "0", at the next step: the others never have so few
    assert lengths[0] + 1 < min(lengths[1:]) + 1
    found = watched.finish()
    assert isinstance(found["0"].error, RuntimeError)
    assert [found[number].value for number in "12"] == expected[1:]


def test_an_answer_that_has_ended_is_kept_when_an_admission_fails(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step a text ends and another has no memory to begin in."""
    watched = Watched(session)
    watched.ask("ends", "write", text="红色", decoding={"max_new_tokens": 2})
    watched.ask("goes on", "write", text="蓝色", decoding={"max_new_tokens": 9})
    watched.engine.step()

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    add = Slots.add
    monkeypatch.setattr(Slots, "add", full)
    watched.ask("new", "write", text="条纹", decoding={"max_new_tokens": 9})
    watched.engine.step()
    monkeypatch.setattr(Slots, "add", add)
    found = watched.finish()
    assert isinstance(found["new"].error, torch.OutOfMemoryError)
    assert found["ends"].value == session.run("write", decoding={"max_new_tokens": 2}, text="红色")
    assert found["goes on"].value == session.run("write", decoding={"max_new_tokens": 9}, text="蓝色")


def test_slots_that_find_no_memory_stay_as_they_are(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that needs longer slots than there is memory for fails; those in the slots go on, exactly."""
    watched, zeros = Watched(session), torch.zeros
    watched.ask("short", "write", text="红色", decoding=SAMPLED)
    watched.engine.step()

    def scarce(*shape: Any, **more: Any) -> Any:
        if len(shape) == 1 and isinstance(shape[0], tuple) and len(shape[0]) == 4 and shape[0][2] > 100:  # slots
            taken.append(shape)
            if len(taken) > 1:  # the second layer
                raise MemoryError
        return zeros(*shape, **more)

    taken: list[Any] = []
    watched.ask("long", "write", text="红色", decoding={**SAMPLED, "max_new_tokens": 100})
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", scarce)
        watched.engine.step()
    assert len(taken) > 1 and watched.engine.state().texts == 1
    found = watched.finish()
    assert isinstance(found["long"].error, MemoryError)
    assert found["short"].value == session.run("write", decoding=SAMPLED, text="红色")


def test_jobs_that_fail_together_are_tried_one_by_one_within_their_room(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(model: Any, ids: Any, *given: Any) -> Any:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return fill(model, ids, *given)

    monkeypatch.setattr("openm6.inference.draw.fill", few)
    watched = Watched(session)
    for number in range(5):
        watched.ask(str(number), "text_to_image", caption="红色", decoding={"passes": 3, "guidance": 0.0})
    most = 0
    while not watched.engine.is_idle:
        watched.engine.step()
        most = max(most, len(watched.engine.state().jobs))
    assert most == 2  # as many as ever
    assert not [told for told in watched.finish().values() if told.error]


def test_a_cancellation_that_overtakes_its_request_holds(session: Session) -> None:
    """The engine has seen it, or has not yet; or it comes while the request is read."""
    watched = Watched(session)

    class Slow(UserDict[str, Any]):
        def __iter__(self) -> Any:
            if not watched.engine.state().early_cancellations:
                watched.engine.cancel("while it is read")
                watched.engine.step()
            return super().__iter__()

    watched.ask("while it is read", "write", record=Slow(text="红色"))
    assert watched.engine.state().early_cancellations == 1
    watched.engine.cancel("not seen")
    with pytest.raises(CancelledError):
        watched.ask("not seen", "write", text="红色")
    watched.ask("other", "write", text="红色")
    watched.engine.step()
    watched.engine.cancel("seen")
    watched.engine.step()
    with pytest.raises(CancelledError):
        watched.ask("seen", "write", text="红色")
    found = watched.finish()
    assert found["other"].error is None and watched.engine.state().cancelled == 3
    assert isinstance(found["while it is read"].error, CancelledError)


def test_cancellations_of_what_never_comes_are_forgotten(session: Session) -> None:
    watched = Watched(session)
    for number in range(EARLY + 10):
        watched.engine.cancel(str(number))
    watched.ask("other", "write", text="红色", decoding={"max_new_tokens": 2})
    watched.finish()
    assert watched.engine.state().early_cancellations == EARLY


def test_what_is_given_up_is_not_read(session: Session) -> None:
    """What has been cancelled is refused before its texts and pictures are read; so is what comes too late."""
    watched = Watched(session)
    watched.engine.cancel("gone")
    with pytest.raises(CancelledError):
        watched.ask("gone", "kind", record={"photo": b"read, this is an error"})
    with pytest.raises(TimeoutError):
        watched.ask("late", "kind", record={"photo": b"likewise"}, seconds=-1)
    assert not watched.finish() and watched.engine.state().cancelled == 1


def test_a_deadline_that_passes_while_a_request_waits_is_an_error(session: Session) -> None:
    watched = Watched(session)
    late = watched.ask("late", "write", text="红色", seconds=60)
    watched.ask("fine", "write", text="红色", seconds=60, decoding={"max_new_tokens": 4})
    late.deadline = time.monotonic() - 1
    found = watched.finish()
    assert isinstance(found["late"].error, TimeoutError) and found["fine"].error is None


def test_prompts_are_not_read_again_in_the_engines_thread(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(session)
    watched.ask("vector", "text_vector", text="红色")
    watched.ask("text", "write", text="红色", decoding={"max_new_tokens": 2})
    watched.ask("label", "kind", photo=torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), probabilities=True)

    def encode(*given: Any, **more: Any) -> Any:
        raise AssertionError("a text is tokenized")

    monkeypatch.setattr(type(session.processor.tokenizer), "encode", encode)
    assert not [told.error for told in watched.finish().values() if told.error]


def test_requests_that_differ_in_their_seeds_alone_read_their_prompt_once(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(model: Any, batch: Any, capacity: int) -> Any:
        rows.append(len(batch.ids))
        return prefill(model, batch, capacity)

    expected = [session.run("write", decoding={**SAMPLED, "seed": seed}, text="红色条纹") for seed in range(8)]
    monkeypatch.setattr("openm6.serve.texts.prefill", counted)
    watched = Watched(session)
    for seed in range(8):
        watched.ask(str(seed), "write", text="红色条纹", decoding={**SAMPLED, "seed": seed})
    found = watched.finish()
    assert rows == [1] and [found[str(seed)].value for seed in range(8)] == expected

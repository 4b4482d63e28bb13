"""The engine against the offline decoder, whatever else it does at the same time."""

from __future__ import annotations

import random
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from openm6.core.batch import pad
from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.decoding import kv_bytes
from openm6.inference.session import Session
from openm6.model.cache import prefill, step
from openm6.serve.caches import Recent, Slots, prefixes_of
from openm6.serve.engine import Engine
from openm6.serve.wire import Settings
from openm6.serve.work import EngineRequest
from tests.conftest import drawing_session
from tests.serve.conftest import Watched
from tests.tasks.conftest import picture

TEXTS = ["红色", "蓝色的杯子", "条纹连衣裙，红色条纹", "图中的商品是什么？", "画"]


def offline(session: Session, task: str, decoding: dict, **record: Any) -> Any:
    return session.run(task, decoding=decoding, **record)


def test_texts_are_those_of_the_offline_decoder(session: Session) -> None:
    """Greedy, sampled and constrained, of all lengths, joining and leaving at any time."""
    rng = random.Random(0)
    watched = Watched(session, batch=3)
    asked = {}
    for number in range(24):
        decoding = {"max_new_tokens": rng.randint(1, 20)}
        if rng.random() < 0.5:
            decoding |= {"temperature": 0.8, "seed": rng.randint(0, 9), "top_k": rng.choice([0, 5])}
        if number % 4 == 0:
            decoding |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
        task, record = ("kind", {"photo": picture(seed=number % 5)}) if number % 3 == 0 else (
            "write", {"text": rng.choice(TEXTS)}
        )  # fmt: skip
        asked[str(number)] = (task, decoding, record)
        watched.ask(str(number), task, record=record, decoding=decoding)
        for _ in range(rng.randint(0, 3)):
            watched.engine.step()
    found = watched.finish()
    assert len(found) == 24
    for identity, (task, decoding, record) in asked.items():
        assert found[identity].error is None
        assert found[identity].value == offline(session, task, decoding, **record), identity
    pieces = watched.texts()
    for identity, (task, _, _) in asked.items():
        if task == "write":
            assert pieces[identity] == found[identity].value


def test_a_causal_source_is_read_so(session: Session) -> None:
    causal = drawing_session(max_length=64, tasks=("vqa", "text_to_image"), source="causal", initializer_range=0.2)
    watched = Watched(causal)
    few = {"max_new_tokens": 6}
    for number, text in enumerate((*TEXTS, TEXTS[0])):
        watched.ask(str(number), "question_answering", question=text, decoding=few)
        watched.engine.step()
    watched.ask("drawn", "text_to_image", caption="红色", decoding={"passes": 0, "seed": 3})
    found = watched.finish()
    for number, text in enumerate(TEXTS):
        assert found[str(number)].value == offline(causal, "question_answering", few, question=text)
    assert watched.engine.state().prompt_hits == 1
    assert found["drawn"].error is None


def test_labels_come_with_probabilities_where_they_are_asked_for(session: Session) -> None:
    watched = Watched(session)
    for seed in range(3):
        watched.ask(str(seed), "kind", record={"photo": picture(seed=seed)}, probabilities=True)
    found = watched.finish()
    for seed in range(3):
        record = {"photo": picture(seed=seed)}
        assert found[str(seed)].value["value"] == session.run("kind", **record)
        assert found[str(seed)].value["probabilities"] == pytest.approx(
            next(session.label_probabilities("kind", [record])), abs=1e-5
        )
    with pytest.raises(UsageError, match="its one output has to be a label"):
        watched.ask("x", "write", text="红", probabilities=True)


def test_every_other_kind_of_work_gives_what_it_gives_alone(session: Session) -> None:
    watched = Watched(session)
    drawing = {"passes": 3, "guidance": 1.0, "seed": 4, "temperature": 1.0}
    for number, caption in enumerate(("红色的杯子", "蓝色条纹")):
        watched.ask(f"d{number}", "text_to_image", caption=caption, candidates=2, decoding=drawing)
    watched.ask("one by one", "text_to_image", caption="红色", decoding={"passes": 0, "guidance": 0.0, "seed": 2})
    watched.ask("v", "text_vector", text="红色", decoding={"dims": 8})
    watched.ask("w", "text_vector", text="蓝色的杯子", decoding={"dims": 8})
    watched.ask("b", "write", text="红色", decoding={"num_beams": 3, "max_new_tokens": 6})
    watched.ask("s", "live_script_edit", asr="红色条纹，蓝色圆点", decoding={"max_new_tokens": 12})
    watched.ask("t", "write", text="红色", decoding={"max_new_tokens": 30})
    found = watched.finish()
    assert not [told for told in found.values() if told.error]
    for number, caption in enumerate(("红色的杯子", "蓝色条纹")):
        expected = session.draw("text_to_image", candidates=2, decoding=drawing, caption=caption)
        given = found[f"d{number}"].value
        assert [p.codes.tolist() for p in given] == [p.codes.tolist() for p in expected]
    alone = session.draw("text_to_image", decoding={"passes": 0, "guidance": 0.0, "seed": 2}, caption="红色")
    assert found["one by one"].value[0].codes.tolist() == alone[0].codes.tolist()
    for identity, text in (("v", "红色"), ("w", "蓝色的杯子")):
        np.testing.assert_allclose(
            found[identity].value, session.run("text_vector", text=text, decoding={"dims": 8}), atol=1e-5
        )
    assert found["b"].value == offline(session, "write", {"num_beams": 3, "max_new_tokens": 6}, text="红色")
    assert found["s"].value == offline(session, "live_script_edit", {"max_new_tokens": 12}, asr="红色条纹，蓝色圆点")
    assert found["t"].value == offline(session, "write", {"max_new_tokens": 30}, text="红色")


def test_a_prompt_that_was_read_before_is_not_read_again(session: Session) -> None:
    watched = Watched(session)
    for seed in range(4):
        decoding = {"max_new_tokens": 5, "temperature": 1.0, "seed": seed}
        watched.ask(str(seed), "write", text="红色条纹", decoding=decoding)
        watched.finish()
    state = watched.engine.state()
    assert (state.prompt_hits, state.prompt_misses) == (3, 1)
    for seed, told in watched.finish().items():
        decoding = {"max_new_tokens": 5, "temperature": 1.0, "seed": int(seed)}
        assert told.value == offline(session, "write", decoding, text="红色条纹")


def test_a_picture_that_was_seen_before_is_not_read_again(session: Session) -> None:
    watched = Watched(session)
    features = watched.engine.features
    assert features is not None
    recent = features.recent
    photo, before = picture(seed=77), (recent.hits, recent.misses)
    for number, task in enumerate(("kind", "caption", "kind")):
        watched.ask(str(number), task, photo=photo, decoding={"max_new_tokens": 4})
        watched.finish()
    assert (recent.hits - before[0], recent.misses - before[1]) == (1, 1)  # the third is a prompt that was read
    direct = features.read
    pixels = torch.randint(0, 255, (3, 16, 8, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = direct(pixels[[0, 1, 0, 2]])
        torch.testing.assert_close(session.model.image(pixels[[0, 1, 0, 2]]), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(session.model.image(pixels[[2, 1]]), direct(pixels[[2, 1]]), atol=1e-5, rtol=1e-5)


def test_what_was_used_least_lately_is_forgotten() -> None:
    recent: Recent[str] = Recent(10)
    for key in (b"a", b"b"):
        recent.put(key, key.decode(), 5)
    assert recent.get(b"a") == "a"
    recent.put(b"c", "c", 5)
    assert recent.get(b"b") is None and recent.get(b"a") == "a" and recent.get(b"c") == "c"
    recent.put(b"d", "large", 11)
    assert recent.get(b"d") is None and len(recent) == 2


def test_what_is_cancelled_leaves_at_once(session: Session) -> None:
    watched = Watched(session)
    for identity in "abc":
        watched.ask(
            identity, "write", text="红色", decoding={"max_new_tokens": 60, "temperature": 2.0, "seed": ord(identity)}
        )
    watched.ask("d", "text_to_image", caption="红", decoding={"passes": 40, "guidance": 0.0})
    for _ in range(4):
        watched.engine.step()
    before = watched.engine.state()
    assert before.jobs == (1,)
    watched.engine.cancel("b")
    watched.engine.cancel("d")
    watched.engine.cancel("nobody")
    watched.engine.step()
    after = watched.engine.state()
    assert after.texts <= before.texts - 1 and not after.jobs
    found = watched.finish()
    assert {identity for identity in found if found[identity].error is None} == {"a", "c"}
    assert watched.engine.state().cancelled == 2
    for identity in "ac":
        decoding = {"max_new_tokens": 60, "temperature": 2.0, "seed": ord(identity)}
        assert found[identity].value == offline(session, "write", decoding, text="红色")


@pytest.mark.parametrize(
    ("task", "record", "decoding"),
    [
        ("write", {"wrong": "红色"}, {}), ("kind", {"photo": b"nothing"}, {}), ("nothing", {"text": "红色"}, {}),
        ("write", {"text": "红色"}, {"temprature": 1}), ("text_vector", {"text": "红色"}, {"dims": 1000}),
        ("text_to_image", {"caption": "红"}, {"branches": 0}),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused(session: Session, task: str, record: dict, decoding: dict) -> None:
    watched = Watched(session)
    with pytest.raises(OpenM6Error):
        watched.ask("bad", task, record=record, decoding=decoding)
    watched.ask("good", "write", text="红色", decoding={"max_new_tokens": 4})
    assert set(watched.finish()) == {"good"}


def test_what_has_no_room_fails_alone(session: Session) -> None:
    watched = Watched(session, capacity=40)
    watched.ask("too long", "write", text="红色" * 20, decoding={"max_new_tokens": 30})
    watched.ask("good", "write", text="红色", decoding={"max_new_tokens": 4})
    found = watched.finish()
    assert found["good"].error is None and isinstance(found["too long"].error, UsageError)
    assert watched.engine.state().failed == 1


def test_memory_that_runs_out_in_one_request_does_not_end_the_others(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a batch with a white picture takes more memory than there is."""

    def scarce(model: Any, batch: Any, capacity: int) -> Any:
        if any(int(images.pixels.max()) == 255 for images in batch.images):
            raise torch.OutOfMemoryError("out of memory")
        return prefill(model, batch, capacity)

    monkeypatch.setattr("openm6.serve.texts.prefill", scarce)
    watched = Watched(session)
    watched.ask("large", "kind", photo=np.full((8, 8, 3), 255, np.uint8))
    watched.ask("small", "kind", photo=np.zeros((8, 8, 3), np.uint8))
    found = watched.finish()
    assert isinstance(found["large"].error, torch.OutOfMemoryError) and found["small"].value in ("鞋", "包", "连衣裙")


def test_what_breaks_a_step_fails_those_alone_that_were_in_it(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [1]

    def once(model: Any, *given: Any, **more: Any) -> Any:
        if broken and broken.pop():
            raise RuntimeError("a kernel fails")
        return step(model, *given, **more)

    watched = Watched(session)
    watched.ask("first", "write", text="红色")
    watched.engine.step()
    monkeypatch.setattr("openm6.serve.caches.step", once)
    watched.engine.step()
    watched.ask("later", "write", text="红色")
    found = watched.finish()
    assert isinstance(found["first"].error, RuntimeError)
    assert found["later"].value == offline(session, "write", {}, text="红色")


def test_memory_is_kept_within_its_budget(session: Session) -> None:
    """With room for few texts the others wait, and all are answered."""
    watched = Watched(session, cache_mib=1, batch=4)
    for number in range(60):
        watched.ask(
            str(number), "write", text="红色", decoding={"max_new_tokens": 12, "temperature": 1.0, "seed": number}
        )
    most = 0
    while not watched.engine.is_idle:
        watched.engine.step()
        most = max(most, watched.engine.state().texts)
    assert 1 < most <= 2**20 // kv_bytes(session.model, 1, 64, torch.float32) < 60
    found = watched.finish()
    for number in (0, 59):
        decoding = {"max_new_tokens": 12, "temperature": 1.0, "seed": number}
        assert found[str(number)].value == offline(session, "write", decoding, text="红色")


def test_long_work_does_not_keep_short_work_waiting(session: Session) -> None:
    """Beside pictures of many passes a text of a few tokens is answered long before them, and they are not starved."""
    watched = Watched(session, batch=1)
    for number in range(3):
        watched.ask(f"picture {number}", "text_to_image", caption="红", decoding={"passes": 30, "guidance": 0.0})
    for _ in range(3):
        watched.engine.step()
    watched.ask("text", "write", text="红色", decoding={"max_new_tokens": 3})
    watched.finish()
    order = [told.id for told in watched.events if told.done]
    assert order[0] == "text" and len(order) == 4


def test_an_engine_that_stops_takes_no_more(session: Session) -> None:
    watched = Watched(session)
    watched.ask("a", "write", text="红色")
    watched.finish()
    watched.engine.stop()
    with pytest.raises(UsageError, match="stopping"):
        watched.ask("d", "write", text="红色")


def test_it_runs_in_a_thread_and_ends_when_all_is_answered(session: Session) -> None:
    done = []
    engine = Engine(session, done.append, Settings())
    thread = Thread(target=engine.run)
    thread.start()
    for number in range(5):
        message = {"id": str(number), "task": "write", "record": {"text": "红色"}, "decoding": {"max_new_tokens": 6}}
        engine.submit(EngineRequest.of(message))
    engine.stop()
    thread.join(60)
    assert not thread.is_alive() and {told.id for told in done if told.done} == set("01234")


@torch.inference_mode()
def test_slots_hold_what_caches_hold(session: Session) -> None:
    """Rows join and leave; the hidden states are those of each alone."""
    model, rng = session.model, np.random.default_rng(0)
    prompts = [session.prompt(session.task("write"), {"text": text}) for text in TEXTS]
    slots = Slots(model, 128, 10**7, torch.float32)
    caches = {}
    for number, prompt in enumerate(prompts):
        hidden, cache = prefill(model, pad([prompt], 0), len(prompt))
        slots.add(prefixes_of(hidden, cache), 30 + 10 * number)  # it grows to 128 positions
        caches[number] = prefill(model, pad([prompt], 0), 64)[1]
    order = list(caches)
    for turn in range(12):
        tokens = torch.from_numpy(rng.integers(1, 90, len(order)))
        hidden = slots.step(model, tokens)
        for row, number in enumerate(order):
            alone = step(model, tokens[row : row + 1], caches[number])[0]
            torch.testing.assert_close(hidden[row], alone, atol=1e-4, rtol=1e-4)
        if turn in (2, 5, 8):
            slot = int(rng.integers(len(order)))
            slots.drop(slot)
            order[slot] = order[-1]
            order.pop()
        if turn == 6:
            hidden, cache = prefill(model, pad([prompts[0]], 0), len(prompts[0]))
            slots.add(prefixes_of(hidden, cache), 40)
            caches[9], order = prefill(model, pad([prompts[0]], 0), 64)[1], [*order, 9]


def test_pictures_keep_to_their_memory(session: Session) -> None:
    """Of requests that need more together than there is, each is worked at alone; one that needs more is refused."""
    many = {"passes": 2, "guidance": 0.0, "branches": 32}
    watched = Watched(session, cache_mib=16)
    with pytest.raises(UsageError, match="the server has 8 for a request"):
        watched.ask("large", "text_to_image", caption="红色", candidates=16, decoding={**many, "branches": 64})
    asked = [watched.ask(name, "text_to_image", caption="红色", candidates=14, decoding=many) for name in "ab"]
    assert all(4 * 2**20 < one.prepared.kv_bytes < 8 * 2**20 for one in asked)
    watched.engine.step()
    assert watched.engine.state().jobs == (1,)
    watched.engine.stop()
    for name in "ab":
        watched.engine.cancel(name)
    watched.finish()


def test_a_slot_has_the_positions_that_are_needed(session: Session) -> None:
    """A model of very many positions holds as many texts as another; a long one waits until there is room."""
    each = kv_bytes(session.model, 1, 64, torch.float32)
    slots = Slots(session.model, 40_000, 8 * each, torch.float32)
    assert [slots.room(n) for n in (1, 64, 65, 500, 40_000)] == [8, 8, 4, 1, 1]
    prompt = session.prompt(session.task("write"), {"text": "红"})
    hidden, cache = prefill(session.model, pad([prompt], 0), len(prompt))
    slots.add(prefixes_of(hidden, cache), 60)
    assert (slots.room(60), slots.room(100), slots.room(500)) == (7, 3, 0)
    slots.drop(0)
    slots.add(prefixes_of(hidden, cache), 500)
    assert slots.capacity == 512 and slots.room(1) == 0
    slots.drop(0)
    slots.add(prefixes_of(hidden, cache), 20)
    assert slots.capacity == 64 and slots.room(20) == 7

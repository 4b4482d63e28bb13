"""Texts that end at a stop string."""

from __future__ import annotations

import random

import pytest

from openm6.core.errors import UsageError
from openm6.inference import Decoding
from openm6.inference.generate import generate
from openm6.inference.pieces import cut_at_stop
from openm6.inference.session import Session
from tests.serve.conftest import Watched

TEXTS = ["红色", "蓝色的杯子", "条纹连衣裙，红色条纹", "图中的商品是什么？", "画"]


def sampled(seed: int) -> dict:
    return {"max_new_tokens": 24, "temperature": 1.5, "seed": seed}


@pytest.mark.slow
def test_writing_ends_at_the_first_stop(session: Session) -> None:
    """Of one character or several, in one token or over several of them, told in pieces or at once."""
    rng, watched, asked = random.Random(0), Watched(session), {}
    for number in range(40):
        text = TEXTS[number % len(TEXTS)]
        whole = session.run("write", decoding=sampled(number), text=text)
        places = [rng.randrange(len(whole)) for _ in range(2)] if whole else []
        stops = [whole[place : place + rng.randint(1, 3)] for place in places]
        asked[str(number)] = whole, stops
        watched.ask(
            str(number), "write", text=text, decoding=sampled(number), stop=[*stops, ""], pieces=number % 2 == 0
        )
    found, pieces = watched.finish(), watched.texts()
    tokens = 0
    for identity, (whole, stops) in asked.items():
        told = found[identity]
        assert told.error is None and told.value == cut_at_stop(whole, stops)
        assert pieces.get(identity, "") == (told.value if int(identity) % 2 == 0 else "")
        assert told.finished or not stops
        length = len(session.processor.tokenizer.encode(told.value))
        tokens += told.tokens
        assert told.tokens > 0 and (not stops or told.tokens <= 24)
        assert told.tokens >= length or told.value != whole
    assert watched.engine.state().tokens == tokens


def test_what_follows_a_stop_is_not_written(session: Session) -> None:
    whole = session.run("write", decoding=sampled(3), text="红色")
    assert len(whole) > 6
    watched = Watched(session)
    watched.ask("whole", "write", text="红色", decoding=sampled(3))
    watched.ask("cut", "write", text="红色", decoding=sampled(3), stop=[whole[3]])
    found = watched.finish()
    assert found["cut"].value == whole[: whole.index(whole[3])]
    assert found["cut"].tokens < found["whole"].tokens
    order = [told.id for told in watched.events if told.done]
    assert order == ["cut", "whole"]  # it made room before the other one was written


def test_a_beginning_that_becomes_no_stop_is_told_with_the_end(session: Session) -> None:
    whole = session.run("write", decoding=sampled(3), text="红色")
    watched = Watched(session)
    watched.ask("a", "write", text="红色", decoding=sampled(3), stop=[whole[-2:] + "没有"])
    told = watched.finish()["a"]
    assert told.value == watched.texts()["a"] == whole and whole[-2:] in told.piece


def test_beams_and_sketches_are_cut_at_a_stop(session: Session) -> None:
    beams = {"num_beams": 3, "max_new_tokens": 8}
    records = [
        ("write", beams, {"text": "红色"}),
        ("live_script_edit", {"max_new_tokens": 12}, {"asr": "红色条纹，蓝色圆点"}),
    ]
    watched = Watched(session)
    for number, (task, decoding, record) in enumerate(records):
        whole = session.run(task, decoding=decoding, **record)
        assert len(whole) > 2
        watched.ask(str(number), task, record=record, decoding=decoding, stop=[whole[1:3]])
        watched.ask(f"{number} whole", task, record=record, decoding=decoding)
    found = watched.finish()
    for number in range(len(records)):
        whole = found[f"{number} whole"].value
        assert found[str(number)].value == cut_at_stop(whole, [whole[1:3]]) != whole


@pytest.mark.parametrize(
    ("task", "record"),
    [("kind", {"photo": b""}), ("text_vector", {"text": "红"}), ("text_to_image", {"caption": "红"})],
)
def test_what_is_no_text_takes_no_stop(session: Session, task: str, record: dict) -> None:
    watched = Watched(session)
    with pytest.raises(UsageError, match="takes no stop strings") as refused:
        watched.ask("a", task, record=record, stop=["红"])
    assert refused.value.param == "stop"


def test_beams_say_whether_they_came_to_an_end(session: Session) -> None:
    """As texts do; and one that is cut at a stop has."""
    watched, tokenizer = Watched(session), session.processor.tokenizer
    prompt = session.prompt(session.task("write"), {"text": "红色"})
    ended = {}
    for most in (1, 2, 4, 8, 32):
        decoding = {"num_beams": 3, "max_new_tokens": most}
        with session.precision():
            ended[str(most)] = generate(session.model, [prompt], tokenizer.end_ids, Decoding.of(**decoding))[0].finished
        watched.ask(str(most), "write", text="红色", decoding=decoding)
    whole = session.run("write", decoding={"num_beams": 3, "max_new_tokens": 2}, text="红色")
    watched.ask("stopped", "write", text="红色", decoding={"num_beams": 3, "max_new_tokens": 2}, stop=[whole[-1:]])
    found = {identity: told.finished for identity, told in watched.finish().items()}
    assert found == {**ended, "stopped": True} and not found["1"]

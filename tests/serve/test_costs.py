"""What each kind of request costs, told with every event of it."""

from __future__ import annotations

from typing import Any

import pytest

from openm6.core.errors import ErrorKind
from openm6.inference.labels import LabelTrees
from openm6.inference.session import Session
from openm6.serve.server import highest_cost
from openm6.serve.worker import described
from tests.serve.conftest import Watched
from tests.tasks.conftest import picture


def prompt_of(session: Session, task: str, **record: Any) -> int:
    return len(session.prompt(session.task(task), record))


def test_a_text_costs_its_prompt_and_what_is_written(session: Session) -> None:
    """As many tokens as the offline decoder makes, and one for the end."""
    watched = Watched(session)
    for number in range(6):
        decoding = {"max_new_tokens": 4 + 6 * number, "temperature": 1.0, "seed": number}
        watched.ask(str(number), "write", text="红色条纹", decoding=decoding)
    found = watched.finish()
    task = session.task("write")
    for number in range(6):
        decoding = {"max_new_tokens": 4 + 6 * number, "temperature": 1.0, "seed": number}
        [alone] = session.generate(task, [session.prompt(task, {"text": "红色条纹"})], 1, decoding)
        told = found[str(number)]
        assert told.tokens == len(alone.ids) + alone.finished
        assert told.prompt_tokens == prompt_of(session, "write", text="红色条纹")
        counts = [one.tokens for one in watched.events if one.id == str(number)]
        assert counts == sorted(counts) and counts[0] >= 1  # pieces too tell what it costs until then
    assert watched.engine.state().tokens == sum(told.tokens for told in found.values())


def test_beams_cost_all_that_is_computed_for_them(session: Session) -> None:
    """Whoever is in the same batch."""
    watched = Watched(session)
    asked = [("红色", 6, 3), ("红色条纹，蓝色圆点", 6, 3), ("红色", 6, 64)]
    for number, (text, most, width) in enumerate(asked):
        decoding = {"num_beams": width, "max_new_tokens": most, "length_penalty": 0.0}
        watched.ask(str(number), "write", text=text, decoding=decoding)
    together = watched.finish()
    for number, (text, most, width) in enumerate(asked):
        alone = Watched(session)
        decoding = {"num_beams": width, "max_new_tokens": most, "length_penalty": 0.0}
        alone.ask("a", "write", text=text, decoding=decoding)
        cost = alone.finish()["a"].tokens
        assert cost == together[str(number)].tokens and cost % width == 0 and width <= cost <= width * most


@pytest.mark.parametrize(
    ("decoding", "candidates", "factor"),
    [
        ({"passes": 3, "guidance": 0.0}, 1, 3), ({"passes": 3, "guidance": 1.0}, 2, 12),
        ({"passes": 0, "guidance": 0.0}, 2, 2), ({"passes": 4, "guidance": 0.0, "branches": 2}, 2, None),
    ],
)  # fmt: skip
def test_pictures_cost_the_codes_of_all_candidates_in_all_passes(
    session: Session, decoding: dict, candidates: int, factor: int | None
) -> None:
    watched, codes = Watched(session), session.codec.side**2
    for identity in "ab":
        watched.ask(
            identity, "text_to_image", caption="红色的杯子", candidates=candidates, decoding={**decoding, "seed": 0}
        )
    found = watched.finish()
    told = found["a"]
    assert told.error is None and told.prompt_tokens == prompt_of(session, "text_to_image", caption="红色的杯子")
    if factor is not None:
        assert told.tokens == codes * factor
    else:  # the passes end when the estimates rise no more: between half of them and all, for each of the candidates
        assert 2 * 2 * 2 * codes < told.tokens <= 4 * 2 * 2 * codes and told.tokens % (2 * codes) == 0
    assert found["b"].tokens == told.tokens


def test_vectors_cost_their_prompt(session: Session) -> None:
    watched = Watched(session)
    watched.ask("v", "text_vector", text="红色的杯子" * 3)
    told = watched.finish()["v"]
    assert (told.tokens, told.prompt_tokens) == (0, prompt_of(session, "text_vector", text="红色的杯子" * 3))


@pytest.mark.parametrize("beams", [1, 4])
def test_probabilities_cost_the_answer_and_the_labels_that_are_read(session: Session, beams: int) -> None:
    decoding, record = {"num_beams": beams, "max_new_tokens": 6}, {"photo": picture(seed=1)}
    watched = Watched(session)
    watched.ask("answer", "kind", record=record, decoding=decoding)
    watched.ask("both", "kind", record=record, decoding=decoding, probabilities=True)
    found = watched.finish()
    read = LabelTrees(session.task("kind"), session.processor).of({}).cost
    assert found["both"].value["value"] == found["answer"].value
    assert found["both"].tokens == found["answer"].tokens + read
    assert found["both"].prompt_tokens == found["answer"].prompt_tokens > 0


def test_probabilities_are_those_of_the_request_alone(session: Session) -> None:
    """Its random numbers too, whoever is in the same batch."""
    decoding, record = {"temperature": 3.0, "seed": 4}, {"photo": picture(seed=1)}
    watched = Watched(session)
    for number in range(8):
        watched.ask(str(number), "kind", record=record, decoding=decoding, probabilities=True)
    assert {told.value["value"] for told in watched.finish().values()} == {
        session.run("kind", decoding=decoding, **record)
    }


def test_an_edit_of_a_sketch_costs_its_drafts(session: Session) -> None:
    watched = Watched(session)
    watched.ask("s", "live_script_edit", asr="红色条纹，蓝色圆点", decoding={"max_new_tokens": 12})
    told = watched.finish()["s"]
    assert told.error is None and told.prompt_tokens > 0
    assert len(session.processor.tokenizer.encode(told.value)) > 0
    assert 0 < told.tokens <= 2 * 12  # a draft has at most so many, in two rounds


def test_what_is_cancelled_tells_what_it_cost(session: Session) -> None:
    """At once, whatever it was."""
    watched, codes = Watched(session), session.codec.side**2
    long = {"max_new_tokens": 60, "temperature": 2.0}
    watched.ask("text", "write", text="红色", decoding={**long, "seed": 1})
    watched.ask("beams", "write", text="红色", decoding={"num_beams": 4, "max_new_tokens": 60})
    watched.ask("picture", "text_to_image", caption="红", decoding={"passes": 40, "guidance": 0.0})
    request = watched.ask("late", "write", text="红色", decoding={**long, "seed": 2}, seconds=3600)
    for _ in range(12):
        watched.engine.step()
    request.deadline = 0.0
    watched.ask("never begun", "write", text="红色")
    for identity in ("text", "beams", "picture", "never begun", "unknown"):
        watched.engine.cancel(identity)
    watched.engine.step()
    told = {one.id: one for one in watched.events if one.done}
    assert set(told) == {"text", "beams", "picture", "late", "never begun"}
    assert all(told[identity].error.kind is ErrorKind.CANCELLED for identity in told if identity != "late")
    assert told["late"].error.kind is ErrorKind.DEADLINE
    assert told["text"].tokens > 1 and told["late"].tokens > 1
    assert told["beams"].tokens >= 4 and told["beams"].tokens % 4 == 0
    assert told["picture"].tokens >= codes and told["picture"].tokens % codes == 0
    assert all(told[identity].prompt_tokens > 0 for identity in ("text", "beams", "picture", "late"))
    assert (told["never begun"].tokens, told["never begun"].prompt_tokens) == (0, 0)
    counts = watched.engine.state()
    assert (counts.cancelled, counts.failed, counts.answered) == (4, 1, 0)
    assert counts.tokens == sum(one.tokens for one in told.values())


@pytest.mark.parametrize(
    ("task", "record", "more"),
    [
        ("write", {"text": "红色"}, {"decoding": {"max_new_tokens": 40, "temperature": 3.0}}),
        ("write", {"text": "红色"}, {"decoding": {"num_beams": 8, "max_new_tokens": 20}}),
        ("write", {"text": "红色"}, {}), ("text_vector", {"text": "红色"}, {}),
        ("kind", {"photo": picture()}, {"probabilities": True, "decoding": {"num_beams": 3}}),
        ("text_to_image", {"caption": "红"}, {"candidates": 3}),
        ("text_to_image", {"caption": "红"}, {"decoding": {"passes": 0, "guidance": 2.0}}),
        ("text_to_image", {"caption": "红"}, {"decoding": {"passes": 4, "branches": 3, "guidance": 2.0}}),
        ("live_script_edit", {"asr": "红色条纹，蓝色圆点"}, {"decoding": {"max_new_tokens": 12}}),
    ],
)  # fmt: skip
def test_the_highest_cost_is_known_before(session: Session, task: str, record: dict, more: dict) -> None:
    asked = {"task": task, "decoding": {}, "candidates": 1, "probabilities": False, **more}
    watched = Watched(session)
    watched.ask("a", task, record=record, **more)
    told = watched.finish()["a"]
    assert told.error is None
    assert 0 < told.prompt_tokens + told.tokens <= highest_cost(described(session), asked)

"""OpenAI's API: what is read, what is refused by name, seeds, several answers at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from openm6.inference.edit import COVERS_ALL
from openm6.inference.session import Session
from openm6.serve.openai_api import side_by_side
from openm6.serve.server import Options
from openm6.serve.wire import Place
from openm6.tasks.task import Task
from tests.serve.test_api import Served
from tests.tasks.conftest import picture

PAIR = "[image:first] [image:second] [text:question] -> [text:answer]"
BOTH = "[text:text] 的类别,颜色 -> [label:kind|set=鞋,包] [label:colour|set=红,蓝]"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def saved(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = [Task.from_instruction(PAIR, name="pair"), Task.from_instruction(BOTH, name="both")]
    place = tmp_path_factory.mktemp("model") / "model"
    Session(session.model, session.processor, [*session.tasks.values(), *more]).save(place)
    return place


@pytest.fixture(scope="module")
def url(saved: Path) -> Iterator[str]:
    one = Served({"m6": Place(saved)}, Options())
    yield one.url
    one.stop()


@pytest.fixture(scope="module")
def alone(saved: Path) -> Session:
    """The same model without a server."""
    return Session.load(saved)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as one:
        yield one


def part(photo: bytes) -> dict[str, Any]:
    url = f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def said(client: openai.OpenAI, *messages: dict[str, Any], model: str = "m6", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=list(messages), **more)


def refused(client: openai.OpenAI, *messages: dict[str, Any], **more: Any) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        said(client, *messages, **more)
    return caught.value


def streamed(client: openai.OpenAI, *messages: dict[str, Any], **more: Any) -> tuple[dict[int, str], dict[int, Any]]:
    """The texts, and the last choices, by the numbers of the answers."""
    texts, last = defaultdict(str), {}
    for chunk in said(client, *messages, stream=True, **more):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            last[choice.index] = choice
    return dict(texts), last


# Pictures


@pytest.mark.slow
def test_every_picture_of_a_conversation_is_given_to_the_task(client: openai.OpenAI, alone: Session) -> None:
    first, second, question = picture(40, 24, seed=1), picture(24, 40, seed=2), "红色的是什么？"
    found = said(client, user(part(first), part(second), question), max_tokens=8)
    expected = alone.run("pair", first=first, second=second, question=question, decoding={"max_new_tokens": 8})
    assert found.choices[0].message.content == expected and found.model == "m6:pair"
    turns = [user(part(first)), user(part(second), question)]
    assert said(client, *turns, max_tokens=8).choices[0].message.content == expected


def test_more_pictures_than_the_task_takes_are_refused(client: openai.OpenAI) -> None:
    photo = part(picture())
    for messages in ([user(photo, photo, "?")], [user(photo, "?"), user(photo, "?")]):
        error = refused(client, *messages, model="m6:vqa")
        assert "vqa takes 1 picture (photo), and messages has 2" in error.message
        assert (error.code, error.param) == ("wrong_inputs", "messages")
    assert "is in no picture format" in refused(client, user(part(b"no picture"), photo, "?")).message
    for wrong in ({"type": "image_url"}, {"type": "input_audio", "input_audio": {}}, {"type": "text", "text": 1}):
        assert "A part of a message is" in refused(client, user(wrong)).message


def test_a_task_without_a_text_is_asked_by_a_picture_alone(client: openai.OpenAI, alone: Session) -> None:
    for model in ("m6:kind", "m6"):
        found = said(client, user(part(picture())), model=model)
        assert found.choices[0].message.content == alone.run("kind", photo=picture())
        assert found.model == "m6:kind"
    assert "kind takes no text" in refused(client, user(part(picture()), "?"), model="m6:kind").message


# What is answered


def test_several_outputs_come_as_json(client: openai.OpenAI, alone: Session) -> None:
    expected = alone.run("both", text="红色的鞋")
    found = said(client, user("红色的鞋"), model="m6:both").choices[0].message.content
    assert json.loads(found) == expected
    assert streamed(client, user("红色的鞋"), model="m6:both")[0] == {0: found}


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("chat/completions", {"messages": [user("红")], "model": "m6:text_vector"}, "gives a vector"),
        ("chat/completions", {"messages": [user("红")], "model": "m6:text_to_image"}, "gives a picture"),
        ("images/generations", {"prompt": "红", "model": "m6:write"}, "gives a text"),
        ("embeddings", {"input": "红", "model": "m6:write"}, "gives a text"),
    ],
)
def test_a_task_of_another_kind_is_refused(http: httpx2.Client, path: str, body: Any, sentence: str) -> None:
    found = http.post(f"/v1/{path}", json=body)
    assert found.status_code == 400, found.text
    assert sentence in found.json()["error"]["message"] and found.json()["error"]["code"] == "wrong_task"


def test_a_task_that_was_not_trained_is_refused_unless_allowed(http: httpx2.Client, client: openai.OpenAI) -> None:
    error = refused(client, user("红色"))
    assert (error.code, error.param) == ("task_not_trained", "model")
    assert "question_answering" in error.message and "write" in error.message and "allow_untrained" in error.message
    assert said(client, user("红色"), max_tokens=2, extra_body={"allow_untrained": True}).choices[0].message.role
    asked = {"inputs": {"photo": base64.b64encode(picture()).decode()}, "decoding": {"max_new_tokens": 2}}
    found = http.post("/v1/tasks/caption", json=asked)
    assert found.status_code == 400 and found.json()["error"]["code"] == "task_not_trained"
    assert http.post("/v1/tasks/caption", json={**asked, "allow_untrained": True}).status_code == 200
    line = json.dumps({"text": "红色____"})
    assert http.post("/v1/tasks/infilling/batch", content=line).json()["error"]["code"] == "task_not_trained"
    assert "outputs" in http.post("/v1/tasks/infilling/batch?allow_untrained=true", content=line).json()
    assert http.post("/v1/embeddings", json={"model": "m6:item_vector", "input": "红"}).status_code == 400


# Fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}), ("tools", [{"type": "function"}]), ("functions", [{}]),
        ("tool_choice", "required"), ("logprobs", True), ("top_logprobs", 2), ("frequency_penalty", 0.5),
        ("presence_penalty", -1), ("logit_bias", {"1": 5}), ("modalities", ["text", "audio"]), ("audio", {}),
        ("prediction", {}), ("reasoning_effort", "high"), ("best_of", 3), ("suffix", "x"), ("store", True),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_refused(client: openai.OpenAI, field: str, value: Any) -> None:
    error = refused(client, user("红色"), model="m6:write", extra_body={field: value})
    assert (error.code, error.param) == ("unsupported_parameter", field) and field in error.message


@pytest.mark.parametrize(
    ("path", "body", "field", "nearest"),
    [
        ("chat/completions", {"messages": [user("红")], "temprature": 1}, "temprature", "temperature"),
        ("chat/completions", {"messages": [{**user("红"), "contents": "x"}]}, "messages.contents", "content"),
        (
            "chat/completions",
            {"messages": [user("红")], "stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "include_usage",
        ),
        ("images/generations", {"prompt": "红", "sede": 1}, "sede", "seed"),
        ("embeddings", {"input": "红", "dimension": 1}, "dimension", "dimensions"),
        ("tasks/write", {"inputs": {"text": "红"}, "decodings": {}}, "decodings", "decoding"),
    ],
)
def test_an_unknown_field_is_refused(http: httpx2.Client, path: str, body: Any, field: str, nearest: str) -> None:
    found = http.post(f"/v1/{path}", json=body)
    error = found.json()["error"]
    assert found.status_code == 400 and (error["code"], error["param"]) == ("unknown_parameter", field)
    assert f'Did you mean "{nearest}"' in error["message"]


def test_fields_that_change_nothing_pass(client: openai.OpenAI) -> None:
    plain = said(client, user("红色"), model="m6:write", max_tokens=8).choices[0].message.content
    more = {
        "user": "u-1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": 1, "logprobs": False,
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": None,
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "safety_identifier": "x",
        "prompt_cache_key": "k", "stop": None, "stream": None, "seed": None,
    }  # fmt: skip
    message = {**user("红色"), "name": "anna", "tool_calls": None, "refusal": None}
    found = client.chat.completions.create(model="m6:write", messages=[message], max_tokens=8, extra_body=more)
    assert found.choices[0].message.content == plain


def test_options_of_decoding_by_this_servers_names(client: openai.OpenAI, alone: Session) -> None:
    options = {"num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    found = said(client, user("红色条纹"), model="m6:write", max_tokens=8, extra_body=options)
    expected = alone.run("write", text="红色条纹", decoding={"max_new_tokens": 8, **options})
    assert found.choices[0].message.content == expected
    error = refused(client, user("红"), model="m6:write", max_tokens=3, max_completion_tokens=4)
    assert "differ" in error.message


def test_fields_of_pictures(http: httpx2.Client, client: openai.OpenAI) -> None:
    assert len(client.images.generate(prompt="红", size="16x16", quality="auto", response_format="b64_json").data) == 1
    for field, value, code in (
        ("size", "1024x1024", "unsupported_value"), ("style", "vivid", "unsupported_parameter"),
        ("response_format", "url", "unsupported_parameter"), ("background", "transparent", "unsupported_parameter"),
        ("output_format", "webp", "unsupported_parameter"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="红", **{field: value})
        assert (caught.value.code, caught.value.param) == (code, field)
        assert field != "size" or "16x16" in caught.value.message
    files = {"image": ("a.png", png(), "image/png"), "mask": ("m.png", png("white"), "image/png")}
    for data, status in (
        ({"size": "16x16", "seed": "3"}, 200),
        ({"size": "32x32"}, 400),
        ({"input_fidelity": "high"}, 400),
        ({"sise": "1"}, 400),
    ):
        found = http.post("/v1/images/edits", files=files, data={"prompt": "红", **data})
        assert found.status_code == status, found.text
        assert status != 200 or (found.json()["seed"], found.json()["warning"]) == (3, COVERS_ALL)
        assert status != 400 or found.json()["error"]["param"] in data
    for field, file in (("mask", png("black")), ("mask", b"no picture"), ("image", b"no picture")):
        found = http.post("/v1/images/edits", files={**files, field: ("a.png", file)}, data={"prompt": "红"})
        assert found.status_code == 400 and found.json()["error"]["param"] == field
    for name in ("image", "image[]"):
        both = [(name, ("a.png", png(), "image/png"))] * 2
        found = http.post("/v1/images/edits", files=both, data={"prompt": "红"})
        assert found.status_code == 400 and found.json()["error"]["param"] == name
    assert http.get("/openapi.json").status_code == 200


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_token_ids_are_refused_with_the_switch_of_the_client(http: httpx2.Client) -> None:
    for ids in ([1, 2, 3], [[1, 2], [3]]):
        error = http.post("/v1/embeddings", json={"input": ids}).json()["error"]
        assert "check_embedding_ctx_length=False" in error["message"] and error["param"] == "input"


def test_empty_stops_are_ignored(client: openai.OpenAI) -> None:
    plain = said(client, user("红色条纹"), model="m6:write", max_tokens=8).choices[0].message.content
    for stop in ("", [""], ["", "不会出现的"]):
        found = said(client, user("红色条纹"), model="m6:write", max_tokens=8, stop=stop)
        assert found.choices[0].message.content == plain != ""


def test_a_text_ends_before_its_stop(client: openai.OpenAI, alone: Session) -> None:
    decodings = [{"max_new_tokens": 12, "temperature": 1.0, "seed": seed} for seed in range(8)]
    written = [alone.run("write", text="红色", decoding=decoding) for decoding in decodings]
    assert sum(map(bool, written)) >= 4
    for seed, expected in [(seed, text) for seed, text in enumerate(written) if text]:
        stop = expected[len(expected) // 2 :][:2]
        options = {"seed": seed, "stop": ["", stop], **SAMPLED}
        found = said(client, user("红色"), model="m6:write", **options)
        text = expected[: expected.index(stop)]
        assert found.choices[0].message.content == text and found.choices[0].finish_reason == "stop"
        texts, last = streamed(client, user("红色"), model="m6:write", **options)
        assert texts[0] == text and last[0].finish_reason == "stop"
    error = refused(client, user(part(picture())), model="m6:kind", stop="红")
    assert error.param == "stop"


# Seeds


def test_a_seed_is_drawn_and_told(client: openai.OpenAI, http: httpx2.Client, alone: Session) -> None:
    found = [said(client, user("红色"), model="m6:write", **SAMPLED).choices[0] for _ in range(3)]
    assert len({choice.seed for choice in found}) == 3
    for choice in found:
        decoding = {"max_new_tokens": 12, "temperature": 1.0, "seed": choice.seed}
        assert choice.message.content == alone.run("write", text="红色", decoding=decoding)
    texts, last = streamed(client, user("红色"), model="m6:write", **SAMPLED)
    again = said(client, user("红色"), model="m6:write", seed=last[0].seed, **SAMPLED)
    assert again.choices[0].message.content == texts[0] and again.choices[0].seed == last[0].seed
    assert said(client, user("红色"), model="m6:write", max_tokens=2).choices[0].seed is None  # it does not sample
    asked = {"inputs": {"text": "红"}, "decoding": {"temperature": 1.0, "max_new_tokens": 12}}
    one, other = (http.post("/v1/tasks/write", json=asked).json() for _ in range(2))
    assert one["seed"] != other["seed"]
    asked["decoding"] |= {"seed": one["seed"]}
    assert http.post("/v1/tasks/write", json=asked).json() == one


def test_pictures_have_a_seed_of_their_own_and_are_drawn_together(client: openai.OpenAI, alone: Session) -> None:
    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as asking:
            return await asyncio.gather(*(asking.images.generate(prompt="红色的杯子", n=2) for _ in range(3)))

    found = asyncio.run(both())
    assert len({one.seed for one in found}) == 3
    for one in found:
        drawn = alone.draw("text_to_image", candidates=2, caption="红色的杯子", decoding={"seed": one.seed})
        for given, expected in zip(one.data, drawn, strict=True):
            image = Image.open(io.BytesIO(base64.b64decode(given.b64_json)))
            assert np.array_equal(np.asarray(image), np.asarray(expected.image))
            assert given.seed == expected.seed == json.loads(image.text["openm6"])["options"]["seed"]  # type: ignore[attr-defined]
    again = client.images.generate(prompt="红色的杯子", n=1, extra_body={"seed": given.seed}).data[0]
    assert again.b64_json and np.array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(again.b64_json)))), np.asarray(image)
    )


def test_a_wish_that_is_too_long_or_blank_is_refused(client: openai.OpenAI, http: httpx2.Client) -> None:
    """1,980 characters of filler never stand for the wish behind them."""
    long = "很好" * 990 + "红色的杯子"
    files = {"image": ("a.png", png(), "image/png"), "mask": ("m.png", png("white"), "image/png")}
    for wish, said in (
        (long, r"positions and its answer 17; the model takes 64 "),
        ("  ", "caption: holds blanks alone"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.images.generate(prompt=wish)
        found = http.post("/v1/images/edits", files=files, data={"prompt": wish})
        assert found.status_code == 400 and re.search(said, found.json()["error"]["message"])
    drawn = client.images.generate(prompt=long, extra_body={"truncate": "start"})
    assert drawn.data[0].b64_json


def test_several_answers_differ_or_are_refused(client: openai.OpenAI, alone: Session) -> None:
    choices = said(client, user("红色"), model="m6:write", n=16, **SAMPLED).choices
    assert [choice.seed for choice in choices] == list(range(choices[0].seed, choices[0].seed + 16))
    assert len({choice.message.content for choice in choices}) > 1
    texts, last = streamed(client, user("红色"), model="m6:write", n=3, seed=5, **SAMPLED)
    for number in range(3):
        decoding = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5 + number}
        assert texts[number] == alone.run("write", text="红色", decoding=decoding)
        assert last[number].seed == 5 + number and last[number].finish_reason in ("stop", "length")
    error = refused(client, user("红色"), model="m6:write", n=2)
    assert "would be the same" in error.message and error.param == "n"


def test_streams_runside_by_side() -> None:
    """The first one waits for the second; a failure of one ends the other."""

    async def run() -> None:
        second, closed = asyncio.Event(), list[str]()

        async def first() -> AsyncGenerator[str, None]:
            yield "first begins"
            await second.wait()
            yield "first ends"

        async def other() -> AsyncGenerator[str, None]:
            yield "second"
            second.set()

        found = [item async for item in side_by_side([first(), other()])]
        assert found.index("second") < found.index("first ends") and len(found) == 3

        async def endless() -> AsyncGenerator[str, None]:
            try:
                await asyncio.Event().wait()
                yield ""
            finally:
                closed.append("endless")

        async def broken() -> AsyncGenerator[str, None]:
            yield "begun"
            raise ValueError("broken")

        items = list[str]()
        with pytest.raises(ValueError, match="broken"):
            async for item in side_by_side([endless(), broken()]):
                items.append(item)
        assert items == ["begun"] and closed == ["endless"]

    asyncio.run(run())

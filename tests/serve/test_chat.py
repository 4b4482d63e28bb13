"""Chats with an imported model: roles, turns and pictures as the task chat has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from openm6.client import Client
from openm6.compress.convert import import_model
from openm6.inference.session import Session
from openm6.serve.server import Options
from openm6.serve.wire import Place
from tests.serve.test_api import Served
from tests.serve.test_openai import part
from tests.tasks.conftest import picture
from tests.weights.test_chat_files import checkpoint

pytestmark = pytest.mark.slow

TURNS = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"}, {"role": "user", "content": "the dog"},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat")
    checkpoint(place / "theirs", max_position_embeddings=2048)
    import_model(place / "theirs", place / "m6", "stem", 16, 2048)
    return place / "m6"


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    one = Served({"m6": Place(model)}, Options())
    yield one
    one.stop()


@pytest.fixture(scope="module")
def alone(model: Path) -> Session:
    return Session.load(model)


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def said(client: openai.OpenAI, messages: list[Any], **more: Any) -> str:
    answer = client.chat.completions.create(model="m6", messages=messages, max_tokens=12, **more)
    return str(answer.choices[0].message.content)


def test_a_conversation_is_answered_as_in_python(client: openai.OpenAI, alone: Session) -> None:
    expected = alone.run("chat", messages=TURNS, decoding={"max_new_tokens": 12})
    assert said(client, TURNS) == expected
    chunks = client.chat.completions.create(model="m6", messages=TURNS, max_tokens=12, stream=True)  # type: ignore[arg-type]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    others = [TURNS[1:], [TURNS[0], TURNS[3]], [TURNS[0], {**TURNS[1], "content": "sat"}, TURNS[2], TURNS[3]]]
    assert {said(client, other) for other in others} != {expected}  # roles and turns matter
    assert said(client, [{**TURNS[0], "role": "developer"}, *TURNS[1:]]) == expected


def test_every_picture_of_every_turn_is_seen(client: openai.OpenAI, alone: Session) -> None:
    photos = [picture(32, 32, seed) for seed in range(2)]

    def turns(first: bytes, second: bytes) -> list[dict[str, Any]]:
        text = {"type": "text", "text": "the cat"}
        return [
            {"role": "user", "content": [text, part(first)]}, {"role": "assistant", "content": "sat"},
            {"role": "user", "content": [part(second), text]},
        ]  # fmt: skip

    asked = turns(photos[0], photos[1])
    answer = client.chat.completions.create(model="m6", messages=asked, max_tokens=12)  # type: ignore[arg-type]
    prompt = alone.prompt(alone.task("chat"), {"messages": asked})
    assert len(prompt.pictures) == 2 and answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == alone.run("chat", messages=asked, decoding={"max_new_tokens": 12})


@pytest.mark.parametrize("name", ["image_url", "image"])
def test_a_path_in_a_message_is_not_read(served: Served, name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret.jpg"
    file.write_bytes(picture())
    value = {"url": str(file)} if name == "image_url" else str(file)
    content = [{"type": name, name: value}]
    with httpx2.Client(base_url=served.url) as http:
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}),
            ("/v1/tasks/chat", {"inputs": {"messages": [{"role": "user", "content": content}]}}),
        ):
            found = http.post(path, json=body)
            assert found.status_code == 400, found.text


BAD = [
    ([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "audio"}]}], "message 2"),
    ([{"role": "assistant", "content": ""}], "message 1 is empty"),
    ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "can only be the first"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_what_is_no_conversation_is_a_400(client: openai.OpenAI, messages: list[Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        said(client, messages)
    assert message in str(caught.value) or "A part of a message" in str(caught.value)


def test_tasks_of_the_library_are_asked_of_it_at_once(served: Served, alone: Session) -> None:
    """Without allow_untrained; a system text changes the answer."""
    with Client(served.url) as m6:
        labels = m6.run("chat", messages=TURNS, decoding={"max_new_tokens": 12})
        assert labels == alone.run("chat", messages=TURNS, decoding={"max_new_tokens": 12})
        options = {"max_new_tokens": 12}
        plain, briefed = (m6.run("summary", passage="the cat", decoding=options, system=s) for s in (None, "Be short."))
        assert plain != briefed
        assert briefed == alone.run("summary", passage="the cat", decoding=options, system="Be short.")

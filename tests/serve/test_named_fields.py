"""Errors of OpenAI's API name the fields that were sent; what an answer tells can be sent again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from openm6.inference.session import Session
from openm6.serve.fleet import Place
from openm6.serve.server import Options
from tests.serve.test_api import Served
from tests.serve.test_openai import part, user


@pytest.fixture(scope="module")
def served(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("model") / "model"
    session.save(place)
    one = Served({"m6": Place(place)}, Options())
    yield one
    one.stop()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": [user("红" * 200)], "model": "m6:write"}, "messages"),
        ("chat/completions", {"messages": [user("红" * 200)], "model": "m6:write", "stream": True}, "messages"),
        ("chat/completions", {"messages": [user(part(b"no picture"), "红")], "model": "m6:vqa"}, "messages"),
        ("chat/completions", {"messages": [user("红")], "model": "m6:write", "max_tokens": 60_000}, "max_tokens"),
        (
            "chat/completions",
            {"messages": [user("红")], "model": "m6:write", "max_completion_tokens": 60_000},
            "max_completion_tokens",
        ),
        ("chat/completions", {"messages": [user("红")], "model": "m6:write", "adapter": "none"}, "adapter"),
        (
            "chat/completions",
            {"messages": [user("红")], "model": "m6:write", "num_beams": 2, "temperature": 1},
            "num_beams",
        ),
        ("chat/completions", {"messages": [user("红")], "model": "m6:write", "stop": 5}, "stop"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ("images/generations", {"prompt": "红" * 200}, "prompt"),
        ("embeddings", {"input": ["红", "红" * 200]}, "input"),
        ("embeddings", {"input": "红", "dimensions": 10_000}, "dimensions"),
        ("tasks/write", {"inputs": {"text": "红"}, "decoding": {"temperature": -1}}, "temperature"),
        ("tasks/write", {"inputs": {"text": "红"}, "decoding": {"temperature": "hot"}}, "decoding.temperature"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_that_was_sent(http: httpx2.Client, path: str, body: Any, param: str) -> None:
    """And not the slot or the option that the field stands for."""
    found = http.post(f"/v1/{path}", json=body)
    assert found.status_code == 400 and found.json()["error"]["param"] == param, found.text


def test_a_refused_value_is_shown_as_json(http: httpx2.Client) -> None:
    found = http.post("/v1/chat/completions", json={"messages": [user("红")], "logprobs": True})
    assert "with the value true: leave it out, or send false." in found.json()["error"]["message"]


@pytest.mark.slow
def test_a_seed_that_was_told_can_be_sent_again(http: httpx2.Client) -> None:
    asked = {"model": "m6:write", "messages": [user("红色")], "temperature": 1.0, "max_tokens": 4}
    several = http.post("/v1/chat/completions", json={**asked, "n": 2, "seed": 2**63 - 1}).json()["choices"]
    [again] = http.post("/v1/chat/completions", json={**asked, "seed": several[1]["seed"]}).json()["choices"]
    assert (again["message"], again["seed"]) == (several[1]["message"], several[1]["seed"])

"""Prompts that are longer than the model, texts that are much longer, and texts that are none, asked of a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from openm6 import Client
from openm6.core.errors import ContextLengthError, DataError, UsageError
from openm6.inference.session import Session
from openm6.serve.incoming import Pictures, record_of
from openm6.serve.server import Options
from openm6.serve.wire import Place
from openm6.tasks.library import get
from tests.serve.conftest import Watched
from tests.serve.test_api import Served

LONG = "红蓝" * 100
ENDING = "红色条纹连衣裙"
FEW = {"max_new_tokens": 4}
SLOTS = {"text": "text", "table": "table", "kind": "label", "answer": "text"}


@pytest.fixture(scope="module")
def served(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("model") / "model"
    Session(session.model, session.processor, [*session.tasks.values(), get("text_vector")]).save(place)
    one = Served({"m6": Place(place)}, Options())
    yield one
    one.stop()


def post(http: httpx2.Client, task: str, inputs: dict[str, Any], **more: Any) -> Any:
    body = {"inputs": inputs, "decoding": FEW if task == "write" else {}, **more}
    return http.post(f"/v1/tasks/{task}", content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize("task", ["write", "text_vector"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_too_long_is_refused_with_both_numbers(http: httpx2.Client, task: str, stream: bool) -> None:
    found = post(http, task, {"text": LONG}, stream=stream)
    told = found.json()["error"]
    assert found.status_code == 400 and told["code"] == "context_length_exceeded" and told["param"] == "text"
    assert "has 201 positions; the model takes 64" in told["message"]


def test_truncated_it_is_answered_and_the_answer_tells(http: httpx2.Client) -> None:
    found = post(http, "write", {"text": LONG + ENDING}, truncate="start").json()
    assert found["truncated"] > 100 and found["usage"]["prompt_tokens"] <= 64
    assert found["outputs"] == post(http, "write", {"text": LONG[-100:] + ENDING}, truncate="start").json()["outputs"]
    assert "truncated" not in post(http, "write", {"text": ENDING}, truncate="start").json()
    assert post(http, "text_vector", {"text": LONG}, truncate="start").json()["truncated"] == 137
    assert post(http, "write", {"text": ENDING}, truncate="end").status_code == 400
    lines = "\n".join(json.dumps({"text": text}) for text in (LONG, ENDING))
    for truncate, answered in (("", 1), ("?truncate=start", 2)):
        batch = http.post(f"/v1/tasks/write/batch{truncate}", content=lines).text.splitlines()
        assert sum("outputs" in json.loads(line) for line in batch) == answered


def test_the_client_raises_and_warns_as_the_local_model(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with Client(served.url) as m6:
        with pytest.raises(ContextLengthError) as raised:
            m6.run("write", text=LONG, decoding=FEW)
        assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "text")
        whole = m6.run("write", text=LONG, decoding=FEW, truncate="start")
        assert [record.name for record in caplog.records] == ["openm6.client"]
        assert "".join(m6.stream("write", text=LONG, decoding=FEW, truncate="start")) == whole
        assert list(m6.run_many("write", [{"text": LONG}], decoding=FEW, truncate="start")) == [whole]
        assert len(caplog.records) == 3
        with pytest.raises(DataError, match="^text is not a valid text"):
            m6.run("write", text="红\ud800")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"inputs": {"text": "红\ud800"}}, "half a character"), ({"inputs": {"te\udfffxt": "红"}}, "half a character"),
        ({"inputs": {"text": "红"}, "examples": [{"text": "\ud800", "answer": "蓝"}]}, "half a character"),
        ({"inputs": {"text": "红"}, "decoding": {"\ud800": 1}}, "half a character"),
        ({"inputs": {"text": "红" * 10**5}}, "has 100,000 characters"),
        ({"inputs": {"text": "红"}, "examples": [{"text": "红" * 10**5, "answer": "蓝"}]}, "has 100,000 characters"),
        ({"inputs": {f"key{i}": 1 for i in range(10**4)}}, "no slot key0"),
    ],
)  # fmt: skip
def test_what_no_model_can_read_is_refused_by_its_slot(http: httpx2.Client, more: dict[str, Any], word: str) -> None:
    found = post(http, "write", **more)
    assert found.status_code == 400 and word in found.json()["error"]["message"] and len(found.text) < 1000


def test_the_front_refuses_before_the_model_is_asked() -> None:
    pictures = Pictures()
    assert record_of({"text": "红" * 320, "kind": 3}, SLOTS, pictures, 10) == {"text": "红" * 320, "kind": 3}
    for wrong in ({"text": "红" * 321}, {"kind": "红" * 321}, {"table": [{"a": "b"}] * 200}):
        with pytest.raises(ContextLengthError, match="takes 320 at most"):
            record_of(wrong, SLOTS, pictures, 10)
    assert record_of({"text": "红" * 321}, SLOTS, pictures, 10, "start")
    with pytest.raises(ContextLengthError):
        record_of({"kind": "红" * 321}, SLOTS, pictures, 10, "start")
    with pytest.raises(UsageError, match='no slot texts.*mean "text"'):
        record_of({"texts": "红"}, SLOTS, pictures, 10)


@pytest.mark.slow
def test_in_the_engine_one_that_is_too_long_fails_alone(session: Session) -> None:
    watched = Watched(session)
    for task, more in (("write", {"decoding": FEW}), ("text_vector", {})):
        with pytest.raises(ContextLengthError):
            watched.ask(f"{task} long", task, text=LONG, **more)
        watched.ask(f"{task} cut", task, text=LONG, truncate="start", **more)
        watched.ask(f"{task} short", task, text=ENDING, truncate="start", **more)
    found = watched.finish()
    assert [found[f"write {name}"].truncated > 0 for name in ("cut", "short")] == [True, False]
    assert [found[f"text_vector {name}"].truncated for name in ("cut", "short")] == [137, 0]

"""What is told of requests to a model: to the log, to Prometheus, and to whoever asked."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from openm6.inference.session import Session
from openm6.serve.server import Options
from openm6.serve.wire import Place
from tests.serve.test_api import Served

ASK = {"inputs": {"text": "红色"}, "decoding": {"max_new_tokens": 3}}
PATHS = ("/v1/tasks/write", "/v1/chat/completions", "/v1/embeddings", "/v1/images/generations")


@pytest.fixture(scope="module")
def served(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("model") / "model"
    session.save(folder)
    one = Served({"m6": Place(folder)}, Options(body_mib=4))
    yield one
    one.stop()


def logged(caplog: pytest.LogCaptureFixture, path: str) -> dict[str, Any]:
    """The line of the last request to a path, which may come after its answer."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        lines = [json.loads(one.message) for one in caplog.records if one.name == "openm6.access"]
        if found := [one for one in lines if one["path"] == path]:
            return found[-1]
        time.sleep(0.01)
    raise AssertionError(f"{path} is not in the log")


@pytest.mark.slow
def test_the_log_says_what_was_asked_of_which_model(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "openm6.access"):
        answer = http.post("/v1/tasks/write", json=ASK)
        line, usage = logged(caplog, "/v1/tasks/write"), answer.json()["usage"]
    assert line["request"] == answer.headers["x-request-id"] and line["status"] == 200
    assert (line["model"], line["task"]) == ("m6", "write")
    assert (line["prompt_tokens"], line["tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert datetime.fromisoformat(line["time"]).tzinfo and line["ms"] > 0


def test_the_tokens_of_many_texts_add_up(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "openm6.access"):
        file = "\n".join(json.dumps({"text": text}) for text in ("红色", "蓝色", "条纹"))
        answers = [json.loads(one) for one in http.post("/v1/tasks/write/batch", content=file).text.splitlines()]
        line = logged(caplog, "/v1/tasks/write/batch")
    assert line["tokens"] == sum(one["usage"]["completion_tokens"] for one in answers) > 0


def test_the_prompt_of_several_answers_is_counted_once(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    question = {"messages": [{"role": "user", "content": "红色"}], "model": "m6:write", "max_tokens": 3}
    with caplog.at_level(logging.INFO, "openm6.access"):
        usage = http.post("/v1/chat/completions", json={**question, "n": 3, "temperature": 1}).json()["usage"]
        line = logged(caplog, "/v1/chat/completions")
    assert (line["prompt_tokens"], line["tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_who_hangs_up_is_499_in_the_log(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    long = {**ASK, "stream": True, "decoding": {"max_new_tokens": 60}, "inputs": {"text": "红色条纹"}}
    with caplog.at_level(logging.INFO, "openm6.access"):
        with http.stream("POST", "/v1/tasks/write", json=long) as answer:
            next(answer.iter_raw())
        line = logged(caplog, "/v1/tasks/write")
    assert line["status"] == 499


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tasks/write", ASK), ("/v1/tasks/write", {**ASK, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "红"}], "stream": True}),
        ("/v1/embeddings", {"input": ["红", "蓝"]}),
    ],
)  # fmt: skip
def test_who_hangs_up_before_the_answer_begins_is_not_worked_for(
    served: Served, path: str, body: dict[str, Any]
) -> None:
    """The model's process is held meanwhile: it cannot have answered."""
    model = served.fleet.get(None)
    os.kill(model.worker.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(served.url + path, json=body, timeout=1)
        until = time.monotonic() + 20
        while model.open_requests:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        os.kill(model.worker.process.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "path", ["/v1/tasks/write", "/v1/chat/completions", "/v1/embeddings", "/v1/images/generations"]
)
def test_half_a_character_is_refused_wherever_it_is(http: httpx2.Client, path: str) -> None:
    headers = {"content-type": "application/json"}
    for body in ('{"model": "\\ud83d"}', '{"\\ud83d": 1}', '{"inputs": {"text": "\\ud83d"}}', '{"input": ["\\udc00"]}'):
        error = http.post(path, content=body, headers=headers).json()["error"]
        assert error["code"] == "invalid_json" and "half a character" in error["message"]
    assert http.get("/v1/tasks", params={"model": b"\xed\xa0\xbd"}).status_code == 404
    assert http.get("/v1/models/%ED%A0%BD").status_code == 404
    lines = http.post("/v1/tasks/write/batch", content=b'{"text": "\\ud83d"}\n{"text": "a"}\n{bad').text.splitlines()
    told = {one["line"]: one.get("error", {}).get("message", "") for one in map(json.loads, lines)}
    assert "The line holds half a character" in told[1] and "The line is not JSON" in told[3]


def test_a_number_that_cannot_be_sent_on_is_refused(http: httpx2.Client) -> None:
    asked = http.post("/v1/tasks/write", json={**ASK, "inputs": {"text": 10**30}})
    assert asked.status_code == 400 and "64 bits" in asked.json()["error"]["message"]


@pytest.mark.slow
def test_figures_name_the_model_and_no_other(http: httpx2.Client) -> None:
    http.post("/v1/tasks/write", json=ASK)
    assert http.post("/v1/tasks/write", json={**ASK, "model": "m7"}).status_code == 404
    page = http.get("/metrics").text
    assert 'openm6_requests_total{kind="text",model="m6",status="ok"}' in page and 'model="m7"' not in page
    assert 'openm6_http_responses_total{status="404"}' in page
    assert 'openm6_restarts_total{model="m6"} 0.0' in page and 'openm6_waiting{model="m6"} 0.0' in page
    [prompts] = [line for line in page.splitlines() if line.startswith('openm6_prompt_tokens_total{kind="text"')]
    assert 'model="m6"' in prompts and float(prompts.split()[-1]) > 0

"""Pictures of a server: each tells its seed, and whether the model finds in it what was asked for."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from openm6 import Client
from openm6.core.images import UNCERTAIN
from openm6.inference.session import Session
from openm6.serve.server import Options
from openm6.serve.wire import Place
from openm6.tasks.library import get
from tests.serve.test_api import Served

ASKED = {"inputs": {"caption": "红色的杯子"}, "candidates": 2, "decoding": {"passes": 2, "temperature": 1.0}}


@pytest.fixture(scope="module")
def served(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that has learned to draw, and to read what it draws, which it does badly."""
    place = tmp_path_factory.mktemp("model") / "model"
    Session(session.model, session.processor, map(get, ("text_to_image", "caption"))).save(place)
    one = Served({"m6": Place(place)}, Options())
    yield one
    one.stop()


def asked(http: httpx2.Client, **decoding: Any) -> Any:
    body = {**ASKED, "decoding": {**ASKED["decoding"], **decoding}}  # type: ignore[dict-item]
    return http.post("/v1/tasks/text_to_image", json=body).json()


@pytest.mark.slow
def test_candidates_tell_their_seeds_and_their_files_too(http: httpx2.Client) -> None:
    found = asked(http)
    candidates = found["outputs"]["candidates"]
    assert sorted(one["seed"] for one in candidates) == [found["seed"], found["seed"] + 1]
    for one in candidates:
        with Image.open(io.BytesIO(base64.b64decode(one["image"]))) as image:
            told = json.loads(image.text["openm6"])  # type: ignore[attr-defined]
        assert told["options"]["seed"] == one["seed"] and told["slots"] == ASKED["inputs"]
    again = asked(http, seed=found["seed"])["outputs"]["candidates"]
    assert [one["image"] for one in again] == [one["image"] for one in candidates]


@pytest.mark.slow
def test_a_picture_that_does_not_read_as_the_wish_is_uncertain(
    http: httpx2.Client, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    found = asked(http)
    assert found["uncertain"] is True and all(one["uncertain"] for one in found["outputs"]["candidates"])
    [drawn] = http.post("/v1/images/generations", json={"prompt": "红色的杯子"}).json()["data"]
    assert drawn["uncertain"] is True
    with Client(served.url) as m6:
        m6.draw("text_to_image", caption="红色的杯子")
    assert [record.getMessage() for record in caplog.records if record.name == "openm6.client"] == [UNCERTAIN]
    assert asked(http, reading=0)["uncertain"] is False  # nothing was read

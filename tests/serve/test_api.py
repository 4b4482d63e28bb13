"""The API as clients see it: OpenAI's own, and plain HTTP, against a server with a real process behind it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
import uvicorn
from PIL import Image

from openm6.core.images import ImageGrid, png
from openm6.inference.edit import edit
from openm6.inference.session import Session
from openm6.model.files import image_encoder_id, load_model
from openm6.serve.api import create_app
from openm6.serve.fleet import Fleet
from openm6.serve.keys import Keys
from openm6.serve.server import Options
from openm6.serve.wire import Place, Settings
from tests.tasks.conftest import picture


class Served:
    """A server in a thread, on a port of its own."""

    def __init__(self, places: dict[str, Place], options: Options, settings: Settings | None = None, **fleet: int):
        self.fleet = Fleet(settings, **fleet)
        app = create_app(self.fleet, options, places)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until = time.monotonic() + 120
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < until
            time.sleep(0.05)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def model(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / "model"
    session.save(place)
    return place


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = Keys(file)
    return file, {
        "user": keys.add("user"), "manager": keys.add("manager", "manage"),
        "slow": keys.add("slow", per_minute=2), "poor": keys.add("poor", per_day=3),
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(model: Path, secrets: Any) -> Iterator[Served]:
    one = Served({"m6": Place(model)}, Options(keys=secrets[0], body_mib=4))
    yield one
    one.stop()


@pytest.fixture(scope="module")
def alone(model: Path) -> Session:
    """The same model without a server."""
    return Session.load(model)


@pytest.fixture
def client(served: Served, secrets: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=secrets[1]["user"], max_retries=0)


@pytest.fixture
def http(served: Served, secrets: Any) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {secrets[1]['user']}"}
    with httpx2.Client(base_url=served.url, headers=headers, timeout=60) as one:
        yield one


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.slow
def test_a_chat_by_openais_client(client: openai.OpenAI, alone: Session) -> None:
    assert [one.id for one in client.models.list()] == ["m6"]
    said = client.chat.completions.create(
        model="m6:write", messages=[{"role": "user", "content": "红色条纹"}], max_tokens=12
    )
    expected = alone.run("write", text="红色条纹", decoding={"max_new_tokens": 12})
    assert said.choices[0].message.content == expected
    assert said.usage.completion_tokens > 0 and said.choices[0].finish_reason in ("stop", "length")
    chunks = list(
        client.chat.completions.create(
            model="m6:write", messages=[{"role": "user", "content": "红色条纹"}], max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected and chunks[-1].usage.completion_tokens == said.usage.completion_tokens
    several = client.chat.completions.create(
        model="m6:write", messages=[{"role": "user", "content": "红色"}], n=3, temperature=1.0, seed=5, max_tokens=8
    )
    for number, choice in enumerate(several.choices):
        decoding = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5 + number}
        assert choice.message.content == alone.run("write", text="红色", decoding=decoding)
    stop = expected[2] if len(expected) > 2 else expected
    cut = client.chat.completions.create(
        model="m6:write", messages=[{"role": "user", "content": "红色条纹"}], max_tokens=12, stop=[stop]
    )
    assert cut.choices[0].message.content == expected[: expected.index(stop)]


def test_a_picture_in_a_chat(client: openai.OpenAI, alone: Session) -> None:
    url = f"data:image/jpeg;base64,{encoded(picture())}"
    content = [{"type": "text", "text": "图中的商品是什么？"}, {"type": "image_url", "image_url": {"url": url}}]
    said = client.chat.completions.create(model="m6", messages=[{"role": "user", "content": content}], max_tokens=6)
    expected = alone.run("vqa", photo=picture(), question="图中的商品是什么？", decoding={"max_new_tokens": 6})
    assert said.choices[0].message.content == expected


def test_pictures_and_vectors_by_openais_client(client: openai.OpenAI, alone: Session) -> None:
    drawn = client.images.generate(model="m6", prompt="红色的杯子", n=2)
    images = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in drawn.data]
    expected = alone.draw("text_to_image", candidates=2, caption="红色的杯子", decoding={"seed": drawn.seed})
    assert [np.asarray(one).tolist() for one in images] == [np.asarray(p.image).tolist() for p in expected]
    for encoding in ({}, {"encoding_format": "float"}):  # by itself the client asks for base64
        found = client.embeddings.create(model="m6", input=["红色", "蓝色的杯子"], dimensions=8, **encoding)
        for one, text in zip(found.data, ("红色", "蓝色的杯子"), strict=True):
            vector = alone.run("text_vector", text=text, decoding={"dims": 8})
            np.testing.assert_allclose(one.embedding, vector, atol=2e-2)  # bf16, in a batch


def test_an_edit_is_the_photo_with_the_mask_redrawn(client: openai.OpenAI, alone: Session) -> None:
    """The photo's size and transparency, and what the SDK gives by the same seed."""
    rng = np.random.default_rng(0)
    pixels, alpha = rng.integers(0, 256, (48, 64, 3), np.uint8), np.full((48, 64, 1), 255, np.uint8)
    alpha[10:30, 20:40] = 0
    cut_out, hole = np.concatenate((pixels, alpha), 2), alpha[..., 0] == 0

    def file(content: np.ndarray) -> tuple[str, bytes, str]:
        return "a.png", png(Image.fromarray(content)), "image/png"

    def edited(photo: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        more = {} if mask is None else {"mask": file(mask)}
        found = client.images.edit(model="m6", image=file(photo), prompt="红色的杯子", n=2, **more)
        options = {"seed": found.seed}
        ours = edit(alone, "text_to_image", photo, mask, candidates=2, decoding=options, caption="红色的杯子")
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json)))) for one in found.data]
        assert all(np.array_equal(image, own.image) for image, own in zip(images, ours, strict=True))
        return images[0]

    white = np.where(hole, 255, 127).astype(np.uint8)
    for photo, mask in ((pixels, cut_out), (pixels, white), (cut_out, None), (np.dstack((pixels, white)), white)):
        found = edited(photo, mask)
        assert np.array_equal(found[~hole], photo[~hole]) and not np.array_equal(found[hole], photo[hole])
    with pytest.raises(openai.BadRequestError, match="a mask has to say what is redrawn"):
        client.images.edit(model="m6", image=file(pixels), prompt="红色的杯子")


def test_a_task_by_its_own_slots(http: httpx2.Client, alone: Session) -> None:
    told = http.get("/v1/tasks/kind").json()
    assert told["schema"]["outputs"]["properties"]["kind"]["enum"] == ["鞋", "包", "连衣裙"]
    assert {"kind", "vqa", "text_to_image"} <= {one["name"] for one in http.get("/v1/tasks").json()["data"]}
    found = http.post("/v1/tasks/kind", json={"inputs": {"photo": encoded(picture())}}).json()
    assert "probabilities" not in found
    sure = http.post("/v1/tasks/kind", json={"inputs": {"photo": encoded(picture())}, "probabilities": True}).json()
    assert sure["outputs"] == found["outputs"]
    assert list(sure["probabilities"].values()) == sorted(sure["probabilities"].values(), reverse=True)
    assert sum(sure["probabilities"].values()) == pytest.approx(1)
    assert found["outputs"] == {"kind": alone.run("kind", photo=picture())}
    assert found["usage"]["completion_tokens"] > 0
    drawn = http.post("/v1/tasks/text_to_image", json={"inputs": {"caption": "红"}, "candidates": 2}).json()
    assert len(drawn["outputs"]["candidates"]) == 2
    assert base64.b64decode(drawn["outputs"]["picture"])[:4] == b"\x89PNG"
    with http.stream("POST", "/v1/tasks/write", json={"inputs": {"text": "红"}, "stream": True}) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert "".join(event.get("piece", "") for event in events) == events[-1]["outputs"]["answer"]


def test_a_file_of_records(http: httpx2.Client, alone: Session) -> None:
    texts = [f"红色{number}" for number in range(50)]
    body = "\n".join([*(json.dumps({"text": text}) for text in texts), "{bad", json.dumps({"wrong": 1}), ""])
    lines = [json.loads(line) for line in http.post("/v1/tasks/write/batch", content=body.encode()).text.splitlines()]
    by_number = {line["line"]: line for line in lines}
    assert len(lines) == 52 and "error" in by_number[51] and "no slot wrong" in by_number[52]["error"]["message"]
    for number in (1, 50):
        assert by_number[number]["outputs"]["answer"] == alone.run("write", text=texts[number - 1])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/tasks/nothing", {}, 404), ("/v1/tasks/write", {"inputs": {"text": "a"}, "model": "m7"}, 404),
        ("/v1/tasks/write", {"inputs": {"wrong": "a"}}, 400), ("/v1/tasks/write", {"unknown": 1}, 400),
        ("/v1/tasks/kind", {"inputs": {"photo": "/etc/passwd"}}, 400),
        ("/v1/tasks/kind", {"inputs": {"photo": "http://127.0.0.1/a.png"}}, 400),
        ("/v1/tasks/kind", {"inputs": {"photo": encoded(b"no picture")}}, 400),
        ("/v1/tasks/write", {"inputs": {"text": {"a": 1}}}, 400),
        ("/v1/tasks/write", {"inputs": {"text": "a"}, "decoding": {"temperature": -1}}, 400),
        ("/v1/tasks/..%2Fwrite", {}, 404), ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"model": "m7", "messages": [{"role": "user", "content": "a"}]}, 404),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_told(http: httpx2.Client, path: str, body: Any, status: int) -> None:
    found = http.post(path, json=body)
    assert found.status_code == status, found.text
    if "error" in found.json():
        assert found.json()["error"]["message"] and "Traceback" not in found.text


def test_who_may_what(served: Served, secrets: Any, caplog: pytest.LogCaptureFixture) -> None:
    def post(key: str | None, path: str, body: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.post(served.url + path, json=body, headers=headers, timeout=60)

    ask = "/v1/tasks/write", {"inputs": {"text": "红"}, "decoding": {"max_new_tokens": 2}}
    assert post(None, *ask).status_code == 401 and post("m6-wrong", *ask).status_code == 401
    assert httpx2.get(served.url + "/metrics").status_code == 401
    assert httpx2.get(served.url + "/healthz").text == "ok" and httpx2.get(served.url + "/readyz").status_code == 200
    keys = secrets[1]
    swap = "/v1/models/m6/promote", {"path": "/nowhere"}
    with caplog.at_level(logging.INFO, "openm6.access"):
        assert post(keys["user"], *swap).status_code == 403
    assert '"key": "user"' in caplog.text
    assert post(keys["manager"], *swap).status_code == 400
    answers = [post(keys["slow"], *ask) for _ in range(3)]
    assert [one.status_code for one in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60
    assert [post(keys["poor"], *ask).status_code for _ in range(3)][-1] == 429
    assert not any(secret in secrets[0].read_text() for secret in keys.values())
    assert secrets[0].stat().st_mode & 0o077 == 0


def test_a_long_name_is_cut_in_the_error(http: httpx2.Client) -> None:
    name = "x" * 50_000
    for path in ("models/{}", "tasks/{}", "jobs/{}", "catalogue/models/{}", "models/{}/lineage"):
        found = http.get(f"/v1/{path.format(name)}")
        assert found.status_code == 404 and len(found.text) < 1000, path
    asked = {"model": name, "messages": [{"role": "user", "content": "红"}]}
    for body in (asked, {**asked, "model": f"m6:{name}"}):
        assert len(http.post("/v1/chat/completions", json=body).text) < 1000


@pytest.mark.slow
def test_a_body_that_is_too_large_is_not_read(http: httpx2.Client) -> None:
    assert http.post("/v1/tasks/write", content=b"x" * (5 * 2**20)).status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 2**17

    json_type = {"content-type": "application/json"}
    assert http.post("/v1/tasks/write", content=parts(), headers=json_type).status_code == 413


def test_the_log_tells_neither_contents_nor_keys(
    http: httpx2.Client, secrets: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "openm6.access"):
        http.post("/v1/tasks/write", json={"inputs": {"text": "秘密"}, "decoding": {"max_new_tokens": 2}})
    line = json.loads(next(r.message for r in caplog.records if "/v1/tasks/write" in r.message))
    assert line["status"] == 200 and line["key"] == "user" and line["bytes_in"] > 0
    assert "秘密" not in caplog.text and secrets[1]["user"] not in caplog.text


def test_figures_for_prometheus(http: httpx2.Client) -> None:
    http.post("/v1/tasks/write", json={"inputs": {"text": "红"}, "decoding": {"max_new_tokens": 2}})
    page = http.get("/metrics").text
    assert 'openm6_requests_total{kind="text",model="m6",status="ok"}' in page
    assert 'openm6_waiting{model="m6"} 0.0' in page and "openm6_first_seconds_bucket" in page


@pytest.mark.slow
def test_beyond_its_queue_it_refuses_and_says_when_to_come_again(model: Path) -> None:
    one = Served({"m6": Place(model)}, Options(), Settings(batch=1, cache_mib=1), queue=2)

    async def all_at_once() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=one.url, timeout=120) as client:
            body = {"inputs": {"caption": "红"}, "decoding": {"passes": 20, "guidance": 0}}
            return await asyncio.gather(*(client.post("/v1/tasks/text_to_image", json=body) for _ in range(20)))

    found = asyncio.run(all_at_once())
    assert {answer.status_code for answer in found} == {200, 429}
    assert all("retry-after" in answer.headers for answer in found if answer.status_code == 429)
    file = "\n".join(json.dumps({"caption": "红"}) for _ in range(5))
    lines = httpx2.post(f"{one.url}/v1/tasks/text_to_image/batch", content=file, timeout=120).text.splitlines()
    assert len(lines) == 5 and all("outputs" in json.loads(line) for line in lines)  # a file waits for room
    one.stop()


def test_keys_are_made_listed_and_taken_away(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    secret = keys.add("anna", "manage", per_minute=5)
    other = Keys(tmp_path / "keys.json")
    assert other.find(secret).name == "anna" and other.find(secret + "x") is None and other.find("") is None
    keys.remove("anna")
    time.sleep(0.01)
    keys.add("bert")
    assert other.find(secret) is None and [key.name for key in other.list()] == ["bert"]


def test_a_model_tells_whether_a_seed_has_one_answer(http: httpx2.Client) -> None:
    assert http.get("/v1/models").json()["data"][0]["reproducible"] is True  # on a CPU, in bf16 or fp32


def test_features_in_the_place_of_a_picture(http: httpx2.Client, model: Path) -> None:
    """As a box sends them: the answer is that to the picture; those of another image encoder are refused."""
    about = http.get("/v1/models").json()["data"][0]
    assert about["image_encoder"] == image_encoder_id(model)
    network, photo = load_model(model), picture(40, 24, seed=8)
    grid = ImageGrid(network.config.image_stride, network.config.image_max_patches)
    pixels = grid.read(photo)
    with torch.no_grad():
        read = network.image(torch.from_numpy(pixels.copy())[None]).numpy().astype(np.float16)
    rows, columns = (side // grid.stride for side in pixels.shape[:2])
    encoder = about["image_encoder"]
    features = {"features": encoded(read.tobytes()), "rows": rows, "columns": columns, "image_encoder": encoder}
    asked = {"question": "图中的商品是什么颜色?"}
    by_picture, by_features = (
        http.post("/v1/tasks/vqa", json={"inputs": {**asked, "photo": one}}) for one in (encoded(photo), features)
    )
    assert by_picture.status_code == by_features.status_code == 200, by_features.text
    assert by_features.json()["outputs"] == by_picture.json()["outputs"]
    other = http.post("/v1/tasks/vqa", json={"inputs": {**asked, "photo": {**features, "image_encoder": "0" * 16}}})
    assert other.status_code == 409 and other.json()["error"]["code"] == "other_image_encoder"
    for wrong in ({"rows": rows + 1}, {"features": "###"}, {"features": encoded(bytes(2 * rows * columns))}):
        found = http.post("/v1/tasks/vqa", json={"inputs": {**asked, "photo": {**features, **wrong}}})
        assert found.status_code == 400, found.text


@pytest.mark.slow
def test_boxes_tell_numbers_alone(served: Served, http: httpx2.Client, secrets: Any) -> None:
    told = {"version": "0002", "seconds": 60, "tasks": {"vqa": {"asked": 10, "sent": 2, "drift": 0.1}}}
    assert http.post("/v1/edges/shop-1", json=told).status_code == 200
    for name, wrong in (
        ("shop-1", {**told, "tasks": {"vqa": {"question": "红色"}}}), ("shop-1", {**told, "photo": "x"}),
        ("shop-1", {**told, "tasks": {"红色": {"asked": 1}}}), ("shop%201", told), ("a" * 65, told),
    ):  # fmt: skip
        assert http.post(f"/v1/edges/{name}", json=wrong).status_code == 400
    assert http.get("/v1/edges").status_code == 403
    manager = {"Authorization": f"Bearer {secrets[1]['manager']}"}
    [box] = httpx2.get(f"{served.url}/v1/edges", headers=manager).json()["data"]
    assert box["name"] == "shop-1" and box["key"] == "user" and box["tasks"]["vqa"]["sent"] == 2
    assert httpx2.post(f"{served.url}/v1/edges/x", json=told).status_code == 401

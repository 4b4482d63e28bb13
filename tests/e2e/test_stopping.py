"""SIGTERM to `openm6 serve` in the midst of work: what is told to those who come then, and to those who wait."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import httpx2
import pytest

from tests.conftest import drawing_session
from tests.e2e.test_console import serving


def open_requests(http: httpx2.Client) -> float:
    """How many requests the model has, running or waiting."""
    page = http.get("/metrics").text
    return sum(float(count) for count in re.findall(r'^openm6_(?:running|waiting)\{model="goods"\} (\S+)', page, re.M))


@pytest.mark.slow
def test_new_requests_are_refused_for_a_moment_before_the_socket_closes(tmp_path: Path) -> None:
    tasks = ("text_to_image", "text_continuation", "text_vector")
    drawing_session(512, tasks, max_position_embeddings=512).save(tmp_path / "goods" / "model")
    environment = {**os.environ, "OPENM6_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    words = ("--no-console", "--jobs", "0", "--linger", "5")
    process, url = serving(tmp_path, environment, tmp_path / "goods" / "model", *words)
    found: list[httpx2.Response] = []

    def draw() -> None:
        body = {"inputs": {"caption": "红"}, "decoding": {"passes": 60, "guidance": 0}, "candidates": 4}
        found.append(httpx2.post(f"{url}/v1/tasks/text_to_image", json=body, timeout=120))

    def many() -> None:
        lines = "".join(f'{{"text": "{"红" * number}"}}\n' for number in range(1, 151))
        found.append(httpx2.post(f"{url}/v1/tasks/text_continuation/batch", content=lines.encode(), timeout=120))

    with process, httpx2.Client(base_url=url) as http:
        asking = [threading.Thread(target=act) for act in (draw, many)]
        for one in asking:
            one.start()
        while open_requests(http) <= 32:  # so many lines of the batch are asked at once, and the picture
            if not all(one.is_alive() for one in asking):
                process.kill()
                pytest.fail(f"The work ended before it was seen: {[one.text[:200] for one in found]}")
        process.send_signal(signal.SIGTERM)
        while (ready := http.get("/readyz")).status_code == 200:
            pass
        assert ready.status_code == 503 and "stopping" in ready.text
        refused = http.post("/v1/tasks/text_vector", json={"inputs": {"text": "红"}})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/healthz").status_code == 200
        for one in asking:
            one.join(120)
        assert [one.status_code for one in found] == [200, 200], [one.text[:300] for one in found]
        wrong = [line for one in found for line in one.text.splitlines() if '"error"' in line]
        assert not wrong, wrong[0]
        assert sorted(len(one.text.splitlines()) for one in found) == [1, 150]
        process.send_signal(signal.SIGTERM)  # once more: at once
        assert process.wait(60) == 0
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{url}/readyz")

"""A server under mixed load for a while: nothing is lost, memory stays flat, and a worker that is killed over and over
costs nobody more than a clean error. OPENM6_SOAK says for how many seconds (`make soak`: an hour)."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest

from openm6 import Client
from openm6.client import ServerError
from tests.conftest import drawing_session
from tests.e2e.test_console import serving
from tests.tasks.conftest import picture

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("OPENM6_SOAK", 12))
CLIENTS = 6
KILLS = 20 if SECONDS > 60 else 5  # so many that requests are refused in the pause after the last one
GROWTH = 0.15
"""Share by which memory may be larger at the end than in the second third of the run, and 30 MiB. In the first third
caches fill: prompts and features of pictures up to prefix_mib each, and oneDNN keeps a kernel for each shape it met."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, str]]:
    tmp_path = tmp_path_factory.mktemp("soak")
    drawing_session(200, tasks=("text_continuation", "caption", "text_vector", "text_to_image")).save(
        tmp_path / "goods" / "model"
    )
    environment = {**os.environ, "OPENM6_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    process, url = serving(tmp_path, environment, tmp_path / "goods" / "model", "--no-console", "--jobs", "0")
    with process:
        yield psutil.Process(process.pid), url
        process.terminate()
        assert process.wait(60) == 0


def worker(server: psutil.Process) -> psutil.Process | None:
    for child in server.children():
        try:
            if "openm6.serve.worker" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def asking(url: str, until: Callable[[], bool], outcomes: Counter[str], seed: int) -> None:
    """One client: requests of all kinds, one after the other; texts that are left half read now and then."""
    chance = random.Random(seed)
    photo = picture()
    with Client(url, retries=8, timeout=120) as m6:
        while not until():
            text = "".join(chance.choices("红色的杯子蓝连衣裙条纹", k=chance.randint(1, 20)))
            decoding = {"max_new_tokens": chance.randint(1, 40), "temperature": 1.0, "seed": chance.randrange(10**6)}
            acts: dict[str, Callable[[], Any]] = {
                "text": lambda text=text, d=decoding: m6.run("text_continuation", text=text, decoding=d),
                "seen": lambda d=decoding: m6.run("caption", photo=photo, decoding=d),
                "vector": lambda text=text: m6.run("text_vector", text=text),
                "picture": lambda text=text: m6.draw("text_to_image", caption=text, decoding={"passes": 2}),
                "stream": lambda text=text, d=decoding: list(m6.stream("text_continuation", text=text, decoding=d)),
                "left": lambda text=text, d=decoding: next(m6.stream("text_continuation", text=text, decoding=d), ""),
            }
            kind = chance.choice(list(acts))
            outcomes["asked"] += 1
            try:
                acts[kind]()
                outcomes["answered"] += 1
            except ServerError:
                outcomes["refused"] += 1


def together(url: str, until: Callable[[], bool], outcomes: Counter[str]) -> None:
    threads = [threading.Thread(target=asking, args=(url, until, outcomes, seed)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_nothing_is_lost_and_memory_stays_flat(server: tuple[psutil.Process, str]) -> None:
    process, url = server
    begun, sizes, outcomes = time.monotonic(), [], Counter[str]()
    child = worker(process)
    assert child is not None

    def over() -> bool:
        passed = time.monotonic() - begun
        if len(sizes) < passed:  # once a second
            sizes.append((process.memory_info().rss, child.memory_info().rss))
        return passed > SECONDS

    together(url, over, outcomes)
    assert outcomes["asked"] == outcomes["answered"] > SECONDS and not outcomes["refused"]
    third = len(sizes) // 3
    warm, last = (np.max(part, 0) for part in (sizes[third:-third], sizes[-third:]))
    for early, late in zip(warm, last, strict=True):
        assert late < early * (1 + GROWTH) + 30 * 2**20, [tuple(rss >> 20 for rss in size) for size in sizes]
    assert process.num_fds() < 100
    print(outcomes, [(a >> 20, b >> 20) for a, b in sizes])


def test_a_worker_that_is_killed_over_and_over_loses_nothing(server: tuple[psutil.Process, str]) -> None:
    process, url = server
    chance, done, outcomes = random.Random(0), threading.Event(), Counter[str]()

    def kill() -> None:
        """Three times in the midst of work, then while it starts, and so on."""
        killed: set[int] = set()
        answered = 0
        while len(killed) < KILLS:
            child = worker(process)
            if child is None or child.pid in killed or (len(killed) % 4 < 3 and outcomes["answered"] == answered):
                time.sleep(0.05)
                continue
            time.sleep(chance.random())
            os.kill(child.pid, signal.SIGKILL)
            killed.add(child.pid)
            answered = outcomes["answered"]
        done.set()

    killer = threading.Thread(target=kill)
    killer.start()
    together(url, done.is_set, outcomes)
    killer.join()
    assert outcomes["asked"] == outcomes["answered"] + outcomes["refused"] > KILLS
    until = time.monotonic() + 120  # one that has died often is started again after a while
    while httpx2.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.2)
    with Client(url) as m6:  # and it answers still
        assert m6.run("text_vector", text="红").shape == (32,)
    print(outcomes)

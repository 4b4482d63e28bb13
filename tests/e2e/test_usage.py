"""The usage that a client is told, the tokens that its key is charged, and those that the engine generated are the same
number, over hundreds of requests of OpenAI's client, of all kinds and at the same time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest

from openm6.inference.session import Session
from openm6.serve.keys import Keys
from openm6.serve.server import Options
from openm6.serve.wire import Place
from openm6.tasks.library import get
from openm6.tasks.task import Task
from tests.conftest import command
from tests.e2e.test_console import serving
from tests.serve.conftest import WORDS, session
from tests.serve.test_api import Served

pytestmark = pytest.mark.slow

__all__ = ["session"]

REQUESTS, CLIENTS, LEFT = 250, 8, 20
TEXTS = ["红色", "蓝色的杯子", "条纹连衣裙，红色条纹", "图中的商品是什么？", "画"]
BEAMS = 4


@pytest.fixture
def model(session: Session, tmp_path: Path) -> Path:
    beams = replace(Task.from_instruction("[text:text] -> [text:answer]", name="beams"), decode={"num_beams": BEAMS})
    tasks = [*session.tasks.values(), beams, get("text_vector"), get("text_to_image")]
    Session(session.model, session.processor, tasks).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str]:
    file = tmp_path / "keys.json"
    return file, Keys(file).add("shop", per_minute=1_000_000, per_day=10_000_000)


@pytest.fixture
def served(model: Path, keys: tuple[Path, str]) -> Iterator[Served]:
    one = Served({"m6": Place(model)}, Options(keys=keys[0]))
    yield one
    one.stop()


def charged(keys: tuple[Path, str]) -> int:
    """As the command line tells, from another process's file."""
    [row] = json.loads(command("keys", "list", "--json", "--keys", keys[0]).stdout)
    assert row["left_today"] == row["per_day"] - row["spent_today"]
    return int(row["spent_today"])


def generated(served: Served) -> tuple[int, int]:
    """What the engine itself has counted, when it has nothing left to do: tokens of answers, and of prompts."""
    worker = served.fleet.get(None).worker
    loop, until = served.server.servers[0].get_loop(), time.monotonic() + 60
    while True:
        state = asyncio.run_coroutine_threadsafe(worker.state(), loop).result(60)
        if not state["running"] and not state["waiting"]:
            return state["tokens"], state["prompt_tokens"]
        assert time.monotonic() < until
        time.sleep(0.05)


class Shop:
    """Random requests of one customer, and the usage that each was told: (prompt, written, prompts that were read)."""

    def __init__(self, served: Served, keys: tuple[Path, str], alone: Session):
        self.client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=keys[1], max_retries=0, timeout=120)
        self.told: list[tuple[int, int, int]] = []
        self.kinds: set[str] = set()
        task, turn = alone.task("write"), threading.Lock()

        @cache
        def offline(text: str, most: int) -> tuple[int, int]:
            """Prompt and answer of a greedy request, counted by the offline decoder."""
            with turn:
                prompt = alone.prompt(task, {"text": text})
                [made] = alone.generate(task, [prompt], 1, {"max_new_tokens": most})
                return len(prompt), len(made.ids) + made.finished

        self.offline = offline

    def ask(self, number: int) -> None:
        chance = random.Random(number)
        text, most, act = chance.choice(TEXTS), chance.randint(1, 30), chance.random()
        if act < 0.1:
            self.note("vector", self.embed([chance.choice(TEXTS) for _ in range(chance.randint(1, 5))]))
        elif act < 0.15:
            used = self.client.images.generate(model="m6", prompt=text, n=chance.randint(1, 3)).usage
            self.note("picture", (used.input_tokens, used.output_tokens, 1))
        elif act < 0.3:
            prompt, written = self.chat("beams", text, most, chance, {})
            assert written % BEAMS == 0 and BEAMS <= written <= BEAMS * most
            self.note("beams", (prompt, written, 1))
        elif act < 0.6:
            prompt, written = self.chat("write", text, most, chance, {})
            assert (prompt, written) == self.offline(text, most)
            self.note("greedy", (prompt, written, 1))
        elif act < 0.8:
            choices = chance.randint(1, 4)
            more = {"temperature": 1.0, "n": choices}
            if chance.random() < 0.7:
                more["seed"] = chance.randrange(1000)
            prompt, written = self.chat("write", text, most, chance, more)
            assert prompt == self.offline(text, most)[0] and choices <= written <= choices * most
            self.note("sampled", (prompt, written, choices))
        else:
            stops = chance.sample([one for one in WORDS if one.strip()], chance.randint(1, 4))
            prompt, written = self.chat("write", text, most, chance, {"stop": stops})
            assert prompt == self.offline(text, most)[0] and 1 <= written <= self.offline(text, most)[1]
            self.note("stop", (prompt, written, 1))

    def note(self, kind: str, used: tuple[int, int, int]) -> None:
        self.told.append(used)
        self.kinds.add(kind)

    def chat(self, task: str, text: str, most: int, chance: random.Random, more: dict[str, Any]) -> tuple[int, int]:
        asked = {
            "model": f"m6:{task}", "messages": [{"role": "user", "content": text}], "max_tokens": most, **more
        }  # fmt: skip
        if chance.random() < 0.5:
            used = self.client.chat.completions.create(**asked).usage
        else:
            chunks = self.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            used = list(chunks)[-1].usage
        assert used.total_tokens == used.prompt_tokens + used.completion_tokens
        return used.prompt_tokens, used.completion_tokens

    def embed(self, texts: list[str]) -> tuple[int, int, int]:
        """Several prompts, all of which count."""
        used = self.client.embeddings.create(model="m6", input=texts).usage
        assert used.total_tokens == used.prompt_tokens
        return used.prompt_tokens, 0, 1

    def leave(self, number: int) -> None:
        """A stream of which somebody reads the beginning alone."""
        chance = random.Random(number)
        chunks = self.client.chat.completions.create(
            model="m6:write", messages=[{"role": "user", "content": chance.choice(TEXTS)}], max_tokens=60,
            temperature=3.0, seed=number, stream=True,
        )  # fmt: skip
        next(iter(chunks))
        chunks.close()


def test_usage_is_what_was_charged_and_what_was_generated(served: Served, keys: tuple[Path, str], model: Path) -> None:
    shop = Shop(served, keys, Session.load(model))
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(shop.ask, range(REQUESTS)))
    assert len(shop.told) == REQUESTS
    assert shop.kinds == {"vector", "picture", "beams", "greedy", "sampled", "stop"}
    written, read = generated(served)
    assert sum(one[1] for one in shop.told) == written
    assert sum(prompt * times for prompt, _, times in shop.told) == read
    before = sum(prompt + tokens for prompt, tokens, _ in shop.told)
    assert charged(keys) == before
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(shop.leave, range(LEFT)))
    after = generated(served)
    assert after[0] > written and after[1] > read
    until = time.monotonic() + 60
    while charged(keys) != before + after[0] - written + after[1] - read:
        assert time.monotonic() < until, "hang-ups are not charged what they cost"
        time.sleep(0.05)


def test_what_was_told_is_charged_when_the_server_is_killed(
    model: Path, keys: tuple[Path, str], tmp_path: Path
) -> None:
    """In the midst of answers, whole ones and streams: `kill -9` loses nothing that a client has seen."""
    alone, long = Session.load(model), {"max_new_tokens": 60, "temperature": 3.0}
    task = alone.task("write")
    prompt = alone.prompt(task, {"text": "红色"})
    seeds = (seed for seed in range(100) if len(alone.generate(task, [prompt], 1, {**long, "seed": seed})[0].ids) > 30)
    environment = {**os.environ, "OPENM6_HOME": str(tmp_path / "home")}
    words = ("--keys", keys[0], "--no-console", "--jobs", "0")
    process, url = serving(tmp_path, environment, f"m6={model}", *words)
    with process:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=keys[1], max_retries=0, timeout=120)
        asked = {"model": "m6:write", "messages": [{"role": "user", "content": "红色"}]}
        whole = client.chat.completions.create(**asked, max_tokens=20).usage.total_tokens
        stream = client.chat.completions.create(**asked, max_tokens=60, temperature=3.0, seed=next(seeds), stream=True)
        pieces = [chunk for chunk, _ in zip(stream, range(5), strict=False)]
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert len(pieces) == 5
    assert whole + 3 <= charged(keys) <= whole + whole + 60

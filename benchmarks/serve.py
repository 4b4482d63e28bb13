"""Serving: requests a second and the time to the first token, by how many clients ask at once, against transformers'
`generate` behind a plain FastAPI handler (texts, the same weights), and against LitServe with dynamic batching around
the same model (the demo's tasks, mixed); and what HTTP and scheduling add to one request.

Closed loop: each client sends its next request when it has its answer. Sides take turns at each number of clients.
Open loop: requests come when they come (Poisson), whatever is answered, at shares of the peak up to twice of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import numpy as np
import torch
import uvloop

from benchmarks._client import Client
from benchmarks.common import ROOT, require_model
from openm6.data.source import open_source
from openm6.inference.session import Session
from openm6.tasks.library import get

TITLE = "Serving: clients at once"
NEW = 32


@dataclass(frozen=True)
class Load:
    """The load: concurrent clients, seconds each time, shares of the peak; for the overhead servers, and requests
    of each, of which the first 40 are warm-up; seconds of warm-up of the others."""

    clients: tuple[int, ...] = (1, 4, 16, 64)
    seconds: float = 8.0
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0)
    servers: int = 7
    asked: int = 200
    warm: float = 1.0


WHOLE = Load()
Items = list[tuple[str, dict[str, Any]]]
"""The requests: tasks, and their records."""
Requests = list[tuple[str, bytes]]
"""The requests of a side: paths and bodies, taken in turn."""


def run(load: Load = WHOLE, root: Path = ROOT) -> tuple[list[dict[str, Any]], str]:
    demo = root / "demo" / "model"
    require_model(demo, "run `make demo` first")
    checkpoint, imported = _checkpoint(root / "bench-serve")
    texts = _texts()
    rows = _compared(
        load,
        "texts of 32 tokens",
        {
            "openm6": (_served(imported), _openm6(texts)),
            "transformers": (_peer("transformers", checkpoint), _plain(texts)),
        },
    )
    mixed = _mixed()
    rows += _compared(
        load,
        "the demo's tasks, mixed",
        {"openm6": (_served(demo), _openm6(mixed)), "litserve": (_peer("litserve", demo), _whole(mixed))},
    )
    rows += _curve(load, demo, mixed)
    rows.append(_overhead(load, demo, mixed))
    note = (
        f"{load.seconds:g} s each; first: the time to the first token where a side streams, else to the answer. Texts: "
        "a Qwen3 of 6 layers, hidden size 256, random weights, bf16 where the machine has units for it, on both sides."
    )
    return rows, note


def _compared(load: Load, what: str, sides: dict[str, tuple[Callable[[], Any], Requests]]) -> list[dict[str, Any]]:
    rows = []
    for clients in load.clients:
        found = {}
        for name, (started, requests) in sides.items():
            with started() as url:
                uvloop.run(_load(url, requests, 2, load.warm))  # warm
                found[name] = uvloop.run(_load(url, requests, clients, load.seconds))
        for name, measured in found.items():
            peer = next(other for other in found if other != name)
            rows.append(_row(what, clients, name, measured))
            rows[-1]["times the other"] = round(measured[0] / found[peer][0], 2)
            print(rows[-1], flush=True)
    return rows


async def _load(url: str, requests: Requests, clients: int, seconds: float) -> Measured:
    """Closed loop."""
    firsts: list[float] = []
    wholes: list[float] = []
    bad = 0
    started = time.perf_counter()

    async def client(number: int, http: Client) -> None:
        nonlocal bad
        turn = number
        while time.perf_counter() - started < seconds:
            times = await http.ask(*requests[turn % len(requests)])
            turn += clients
            if times is None:
                bad += 1
            else:
                firsts.append(times[0])
                wholes.append(times[1])

    with Client(url) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return len(wholes) / (time.perf_counter() - started), firsts, wholes, bad


Measured = tuple[float, list[float], list[float], int]
"""Answers a second, seconds to the first token and to the answer of each, and requests that were refused."""


def _row(what: str, clients: int | str, side: str, measured: Measured) -> dict[str, Any]:
    rate, firsts, wholes, refused = measured
    return {
        "what": what, "clients": clients, "side": side, "requests/s": round(rate, 1),
        "first ms p50": round(1000 * median(firsts), 1),
        "first ms p99": round(1000 * float(np.quantile(firsts, 0.99)), 1),
        "answer ms p50": round(1000 * median(wholes), 1), "refused": refused,
    }  # fmt: skip


def _curve(load: Load, model: Path, mixed: Items) -> list[dict[str, Any]]:
    """Open loop: the peak by the most clients, then requests at shares of it."""
    requests, rows = _openm6(mixed), []
    with _served(model)() as url:
        uvloop.run(_load(url, requests, 8, 2 * load.warm))  # warm
        peak, *_ = uvloop.run(_load(url, requests, max(load.clients), load.seconds))
        for share in load.shares:
            measured = uvloop.run(_arriving(url, requests, share * peak, load.seconds))
            side = f"openm6, {share:.0%} of the peak"
            rows.append(_row("the demo's tasks, as they come", f"{share * peak:.0f} a second", side, measured))
            print(rows[-1], flush=True)
    return rows


async def _arriving(url: str, requests: Requests, rate: float, seconds: float) -> Measured:
    """`_load` with an arrival rate of `rate` requests per second; answers are counted within these seconds."""
    rng = np.random.default_rng(0)
    firsts: list[float] = []
    wholes: list[float] = []
    counts = {"refused": 0, "in time": 0}

    async def one(number: int, http: Client) -> None:
        times = await http.ask(*requests[number % len(requests)])
        if times is None:
            counts["refused"] += 1
            return
        firsts.append(times[0])
        wholes.append(times[1])
        counts["in time"] += time.perf_counter() - started < seconds

    with Client(url) as http:
        started, due, running = time.perf_counter(), 0.0, []
        while (due := due + rng.exponential(1 / rate)) < seconds:
            if (wait := started + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            running.append(asyncio.create_task(one(len(running), http)))
        await asyncio.gather(*running)
    return counts["in time"] / seconds, firsts, wholes, counts["refused"]


def _overhead(load: Load, model: Path, mixed: Items) -> dict[str, Any]:
    """One client: milliseconds a request over HTTP, and by the decoder alone with as many threads, taken in turn; the
    median of several servers, and the least and most of them."""
    session, mixed = Session.load(model), mixed[: load.asked]
    records = [(task, {k: base64.b64decode(v) if k == "photo" else v for k, v in r.items()}) for task, r in mixed]

    async def asked(url: str) -> tuple[list[float], list[float]]:
        by_http, alone = [], []
        with Client(url) as http:
            # Each once: the server keeps prompts that it has read.
            for number, (request, (task, record)) in enumerate(zip(_openm6(mixed, stream=False), records, strict=True)):
                took = await http.ask(*request)
                started = time.perf_counter()
                session.run(task, **record)
                if number >= 40 and took:  # before that is warm-up
                    by_http.append(took[1])
                    alone.append(time.perf_counter() - started)
        return by_http, alone

    answers, decoders, more = [], [], []
    for _ in range(load.servers):
        with _served(model)() as url:
            torch.set_num_threads(httpx2.get(f"{url}/v1/models").json()["data"][0]["threads"])
            by_http, alone = uvloop.run(asked(url))
        answers.append(1000 * median(by_http))
        decoders.append(1000 * median(alone))
        more.append(1000 * median(a - b for a, b in zip(by_http, alone, strict=True)))
    row = {
        "what": "one client, the demo's tasks", "clients": 1, "side": "openm6 over the decoder alone",
        "answer ms p50": round(median(answers), 2), "decoder ms p50": round(median(decoders), 2),
        "more ms p50": round(median(more), 2), "least and most": f"{min(more):.2f} to {max(more):.2f}",
    }  # fmt: skip
    print(row, flush=True)
    return row


# What is asked


def _texts() -> Items:
    source = open_source("market:passages/test?records=200")
    return [("text_continuation", {"text": record["passage"][:40] + str(i)}) for i, record in enumerate(source)]


def _mixed() -> Items:
    source = open_source("demo:questions/test?pictures=200")
    texts = open_source("demo:texts/test?pictures=200")
    found: Items = []
    for number in range(200):
        photo = base64.b64encode(source[number * 3]["image"]).decode()
        found.append(
            [
                ("vqa", {"photo": photo, "question": source[number * 3]["question"]}), ("caption", {"photo": photo}),
                ("product_attributes", {"photo": photo}), ("infilling", {"text": texts[number]["text"][:3] + "____。"}),
            ][number % 4]
        )  # fmt: skip
    return found


def _openm6(asked: Items, stream: bool = True) -> Requests:
    told = {"stream": True, "decoding": {"max_new_tokens": NEW}} if stream else {}
    told["allow_untrained"] = True  # the checkpoint that is imported has random weights
    return [(f"/v1/tasks/{task}", _json(inputs=record, **told)) for task, record in asked]


def _plain(asked: Items) -> Requests:
    return [("/run", _json(inputs=record, decoding={"max_new_tokens": NEW})) for _, record in asked]


def _whole(asked: Items) -> Requests:
    return [("/predict", _json(task=task, inputs=r, decoding={"max_new_tokens": NEW})) for task, r in asked]


def _json(**body: Any) -> bytes:
    return json.dumps(body).encode()


# Who answers


def _served(model: Path) -> Callable[[], Any]:
    return lambda: _process(
        [sys.executable, "-m", "openm6", "serve", f"m6={model}", "--no-console", "--jobs", "0", "--port"], "/readyz"
    )


def _peer(kind: str, model: Path) -> Callable[[], Any]:
    return lambda: _process([sys.executable, "-m", f"benchmarks._serve_{kind}", str(model)], "/docs")


@contextmanager
def _process(command: list[str], ready: str) -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        [*command, str(port)], cwd=ROOT.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            try:
                if httpx2.get(url + ready, timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command} does not answer") from None
            time.sleep(0.1)
        yield url
    finally:
        subprocess.run(["pkill", "-TERM", "-s", str(process.pid)], check=False)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            process.wait()


def _checkpoint(folder: Path) -> tuple[Path, Path]:
    """A Qwen3 checkpoint with random weights, and the model directory imported from it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from openm6.compress.convert import import_model
    from openm6.core.tokenizer import Tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    texts = [record["passage"] for record in open_source("market:passages/train?records=2000")]
    tokenizer = Tokenizer.train(texts, 2000, num_codes=0)
    content = json.loads(tokenizer._fast.to_str())
    names = {t["content"]: f"x{i}" for i, t in enumerate(content["added_tokens"])}  # special tokens of others
    content["model"]["vocab"] = {names.get(k, k): v for k, v in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    config = Qwen3Config(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen")
    (folder / "qwen" / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    import_model(folder / "qwen", folder / "imported", "stem", num_codes=0, max_length=256)
    session = Session.load(folder / "imported", "cpu", trainable=True)
    # The server answers tasks that a model has learned.
    Session(session.model, session.processor, [get("text_continuation")]).save(folder / "model")
    return folder / "qwen", folder / "model"

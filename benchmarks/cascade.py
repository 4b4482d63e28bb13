"""An edge device that meets what it was not trained on: a category that it has never heard of, and combinations.

The cloud is a `small` model of the whole catalogue, the edge's a `demo` model of the catalogue without one category
(`without=8`); requests are questions of the test split, all of held-out combinations, about a quarter of them about
pictures with that category, a third of the pictures before each of two rounds of learning, and after them. Calibrated
on what the edge knows alone, with the command's defaults. Both answer over HTTP or in their own process as in use.

    runs/small/model        openm6 train demo with model.preset=small, and model.sizes.image_max_patches=16
    runs/edge-seven/model   openm6 train demo with ?without=8 behind each demo: source

    python -m benchmarks cascade

Where there is no `runs/small/model`, which takes a GPU, a stand-in takes its place: a server that knows the answers and
gives another one to a question in forty.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from benchmarks.common import require_model
from openm6 import Client
from openm6.compress.cascade import calibrate_task, create_device, learn
from openm6.data.store import Record
from openm6.edge.cascade import CLOUD, Cascade
from openm6.edge.device import FILE, EdgeDevice, settings_of, settings_toml
from openm6.worlds.catalogue import open_catalogue

CLOUD_MODEL, EDGE_MODEL = Path("runs/small/model8"), Path("runs/edge-seven/model")
WORK = Path("runs/bench-cascade")
PORT = 8123
KNOWN = "demo:questions/{}?without=8"
LEARN_STEPS = 400
MOST = 1000
SHARES = 0.29, 0.15
"""Fractions of requests deferred, audits included (`deferral_rate` of edge.toml): before learning, and after."""
MODES = ("all", "features")
SEEDS = {"all": (0, 1, 2), "features": (0, 1, 2)}
RIGHT = 0.975
"""Accuracy of the stand-in. A model of 39.2M weights had 97.5 to 98.4% of these questions right."""
TITLE = "An edge model that asks a larger one when it is not sure"


def run() -> tuple[list[dict[str, Any]], str]:
    require_model(EDGE_MODEL, f"see the head of {Path(__file__).name}")
    parts = [part[:MOST] for part in _parts()]
    is_there = (CLOUD_MODEL / "config.json").is_file()
    with _cloud(parts) if is_there else _standin(parts) as known:
        modes = MODES if is_there else MODES[:1]
        rows = [row for mode in modes for seed in SEEDS[mode] for row in _run(mode, seed, parts, known)]
    note = (
        f"Parts of {MOST} questions, one after the other: before learning, after a round of it ({LEARN_STEPS} steps), "
        f"after two; the least confident are deferred: {SHARES[0]:.0%}, later {SHARES[1]:.0%} (`deferral_rate`). "
        + ("" if is_there else f"The cloud is a stand-in that is right in {RIGHT:.1%}. ")
        + "Medians of the seeds first; curves of accuracy by share sent are in the JSON."
    )
    return [*_medians(rows), *rows], note


def _parts(seed: int = 0) -> list[list[Record]]:
    """Test questions in three parts; all questions of a picture are in one."""
    rows = open_catalogue("questions", "test", seed)
    by_picture: dict[str, list[int]] = {}
    for number in range(len(rows)):
        by_picture.setdefault(rows[number]["_where"].partition("#")[2].partition(".")[0], []).append(number)
    rng = np.random.default_rng(0)
    pictures = rng.permutation(list(by_picture))
    parts = []
    for some in np.array_split(pictures, 3):
        numbers = rng.permutation([n for picture in some for n in by_picture[str(picture)]])
        parts.append([rows[int(n)] for n in numbers])
    return parts


@contextmanager
def _cloud(parts: list[list[Record]]) -> Iterator[list[list[str]]]:
    """The large model behind its server; its answers to the parts."""
    log = open(WORK.parent / "bench-cascade.log", "wb")  # noqa: SIM115 (open as long as the server runs)
    server = subprocess.Popen(
        [sys.executable, "-m", "openm6", "serve", str(CLOUD_MODEL), "--port", str(PORT)], stdout=log, stderr=log,
    )  # fmt: skip
    try:
        with Client(f"http://127.0.0.1:{PORT}", retries=0) as client:
            for _ in range(240):
                time.sleep(0.5)
                try:
                    client.models()
                    break
                except Exception:
                    if server.poll() is not None:
                        sys.exit(f"The server ended: see {log.name}.")
            yield [list(client.run_many("vqa", map(_inputs, part))) for part in parts]
    finally:
        server.terminate()
        server.wait()


@contextmanager
def _standin(parts: list[list[Record]]) -> Iterator[list[list[str]]]:
    """A server that answers the questions of the parts, and those answers."""
    rng, every = np.random.default_rng(0), [record for part in parts for record in part]
    kinds = {kind: sorted({r["answer"] for r in every if r["kind"] == kind}) for kind in {r["kind"] for r in every}}
    answers: dict[tuple[str, str], str] = {}
    for record in every:
        others = [answer for answer in kinds[record["kind"]] if answer != record["answer"]]
        wrong = others and rng.random() > RIGHT
        key = base64.b64encode(record["image"]).decode(), record["question"]
        answers[key] = str(rng.choice(others)) if wrong else record["answer"]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("inputs", {})
            answer = answers.get((inputs.get("photo", ""), inputs.get("question", "")), "")
            body = json.dumps({"outputs": {"answer": answer}, "finished": True}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", PORT), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield [[answers[base64.b64encode(r["image"]).decode(), r["question"]] for r in part] for part in parts]
        server.shutdown()


def _inputs(record: Record) -> dict[str, Any]:
    return {"photo": record["image"], "question": record["question"]}


def _run(privacy: str, seed: int, parts: list[list[Record]], known: list[list[str]]) -> list[dict[str, Any]]:
    shutil.rmtree(WORK, ignore_errors=True)
    settings = settings_of({
        "cloud": f"http://127.0.0.1:{PORT}", "privacy": privacy, "requests_per_hour": 10**6, "deadline_ms": 30_000,
        "deferral_rate": SHARES[0],
    })  # fmt: skip
    create_device(WORK, EDGE_MODEL, settings, 8, CLOUD_MODEL if privacy == "features" else None)
    calibrate_task(EdgeDevice(WORK), "vqa", KNOWN.format("validation"))
    rows = []
    for number, (part, cloud) in enumerate(zip(parts, known, strict=True)):
        if number:
            (WORK / FILE).write_text(settings_toml(replace(settings, deferral_rate=SHARES[1])), "utf-8")
            found = learn(WORK, {"vqa": [KNOWN.format("train")]}, steps=LEARN_STEPS, seed=seed)
            print(json.dumps(found, ensure_ascii=False), flush=True)
        device = Cascade(WORK, threads=int(os.environ.get("OMP_NUM_THREADS", "0")), seed=seed)
        own, answers, asked, chances = [], [], [], []
        for record in part:
            alone = device.model.answer("vqa", _inputs(record))
            reply = device.answer("vqa", _inputs(record))
            own.append(alone.value)
            answers.append(reply.value)
            asked.append(reply.by == CLOUD)
            chances.append(reply.probability or 0.0)
        device.close()
        right = np.array([r["answer"] for r in part])
        edge, large = np.array(own) == right, np.array(cloud) == right
        rows.append({
            "privacy": privacy, "seed": seed, "rounds": number, "cloud only": _percent(large),
            "edge only": _percent(edge), "cascade": _percent(np.array(answers) == right), "sent %": _percent(asked),
            "curve": _curve(edge, large, np.array(chances)),
        })  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k != "curve"}, flush=True)
    return rows


def _percent(some: Any) -> float:
    return round(100 * float(np.mean(some)), 2)


def _curve(edge: np.ndarray, large: np.ndarray, chances: np.ndarray) -> dict[str, list[float]]:
    """Accuracy at shares sent of 0, 5, ... 100%: those with the least probability first, at random, and by an oracle
    that sends those first where the cloud is right and the edge is not."""
    orders = {
        "sureness": np.argsort(chances, kind="stable"), "oracle": np.argsort(edge.astype(int) - large, kind="stable"),
    }  # fmt: skip
    found: dict[str, list[float]] = {"share": list(range(0, 101, 5))}
    for name, order in orders.items():
        found[name] = []
        for share in found["share"]:
            sent = order[: round(len(order) * share / 100)]
            right = edge.copy()
            right[sent] = large[sent]
            found[name].append(round(100 * right.mean(), 2))
    ends = found["sureness"][0], found["sureness"][-1]
    found["random"] = [round(ends[0] + (ends[1] - ends[0]) * share / 100, 2) for share in found["share"]]
    return found


def _medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for privacy in dict.fromkeys(row["privacy"] for row in rows):
        for rounds in range(3):
            some = [row for row in rows if (row["privacy"], row["rounds"]) == (privacy, rounds)]
            names = ("cloud only", "edge only", "cascade", "sent %")
            found.append({
                "privacy": privacy, "seed": "median", "rounds": rounds,
                **{name: round(float(np.median([row[name] for row in some])), 2) for name in names},
                "curve": _median_curve([row["curve"] for row in some]),
            })  # fmt: skip
    return found


def _median_curve(curves: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {name: [float(x) for x in np.median([curve[name] for curve in curves], 0)] for name in curves[0]}

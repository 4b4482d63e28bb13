"""Start-up time of commands: a whole `run`, `train` to its first step, `serve` to its first answer, against the time of
`import torch` in the same environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import psutil
import yaml
from PIL import Image

from openm6.train.recipe import check_recipe
from openm6.train.trainer import train

TITLE = "Start-up time of commands"
REPEATS = 7
PATIENCE = 120.0
"""Seconds that a command may take to start."""
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "stem_widths": [8, 8, 8], "image_max_patches": 4,
}  # fmt: skip
"""A network so small that nearly all of the time is the start."""
QUESTION = "什么颜色？"


def run() -> tuple[list[dict[str, Any]], str]:
    with TemporaryDirectory() as folder:
        place = Path(folder)
        _prepare(place)
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            "import torch": lambda: _whole(place, sys.executable, "-c", "import torch"),
            "openm6 run": lambda: _whole(
                place, *_OPENM6, "run", "run/model", "vqa", "photo=红.png", f"question={QUESTION}"
            ),
            "openm6 train": lambda: _trained(place),
            "openm6 serve": lambda: _served(place),
            "openm6 serve --no-console": lambda: _served(place, "--no-console"),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(REPEATS + 1):
            for name, side in sides.items():
                found = side()
                if number:  # the first round fills the caches of files
                    seconds[name].append(found)
    rows = []
    for name, values in seconds.items():
        wall, user = zip(*values, strict=True)
        ratios = [[v[i] / torch[i] for v, torch in zip(values, seconds["import torch"], strict=True)] for i in (0, 1)]
        rows.append({
            "command": name, "seconds": statistics.median(wall), "CPU seconds (user)": statistics.median(user),
            "x import torch": _spread(ratios[0]), "of CPU seconds": _spread(ratios[1]),
        })  # fmt: skip
    return rows, (
        f"Medians of {REPEATS} rounds of all commands in turn; ratios are of the same round, with quartiles. `train` "
        "counts until its first step is logged, `serve` until a question is answered, with the process of its model."
    )


_OPENM6 = (sys.executable, "-m", "openm6")


def _prepare(place: Path) -> None:
    """Write data and a recipe of a hundred steps, and train a model for three."""
    rows = []
    for answer, colour in {"红": (220, 30, 30), "蓝": (30, 30, 220)}.items():
        Image.new("RGB", (64, 64), colour).save(place / f"{answer}.png")
        rows += [{"photo": str(place / f"{answer}.png"), "question": QUESTION, "answer": answer}] * 16
    (place / "goods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe: dict[str, Any] = {
        "name": "start", "output": str(place / "run"), "model": {"preset": "demo", "sizes": SIZES},
        "tokenizer": {"vocab_size": 800, "characters": 64, "num_codes": 16},
        "data": [{"source": str(place / "goods.jsonl"), "task": "vqa"}],
        "train": {"steps": 3, "batch_size": 8, "warmup": 2, "learning_rate": 1e-3, "workers": 0},
    }  # fmt: skip
    train(check_recipe(recipe))
    recipe["train"] |= {"steps": 100, "log_every": 1}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")


def _whole(place: Path, *words: str) -> tuple[float, float]:
    """Wall and user seconds of a command."""
    before, begun = os.times().children_user, time.perf_counter()
    subprocess.run(words, cwd=place, check=True, capture_output=True)
    return time.perf_counter() - begun, os.times().children_user - before


def _served(place: Path, *options: str) -> tuple[float, float]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    picture = b64encode((place / "红.png").read_bytes()).decode()
    body = {"inputs": {"photo": picture, "question": QUESTION}}

    def answered() -> bool:
        try:
            return httpx2.post(f"http://127.0.0.1:{port}/v1/tasks/vqa", json=body, timeout=PATIENCE).is_success
        except httpx2.TransportError:  # nobody listens yet
            return False

    return _until(place, ("serve", "run/model", "--port", str(port), *options), answered)


def _trained(place: Path) -> tuple[float, float]:
    output = place / "runs" / str(time.time_ns())
    log = output / "metrics.jsonl"
    words = ("train", "recipe.yaml", f"output={output}")
    return _until(place, words, lambda: log.is_file() and log.stat().st_size > 0)


def _until(place: Path, words: tuple[str, ...], reached: Callable[[], bool]) -> tuple[float, float]:
    """Wall and user seconds of a command and its processes until `reached` is true; the command is ended then."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        (*_OPENM6, *words), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not reached():
            if process.poll() is not None or time.perf_counter() - begun > PATIENCE:
                raise RuntimeError(f"openm6 {' '.join(words)} did not start: {process.communicate()[1]}")
            time.sleep(0.01)
        wall, top = time.perf_counter() - begun, psutil.Process(process.pid)
        return wall, sum(one.cpu_times().user for one in (top, *top.children(recursive=True)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


def _spread(ratios: list[float]) -> str:
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"

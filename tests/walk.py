"""A walk through a page of the documentation: its commands and Python examples, run on tiny models."""

from __future__ import annotations
import __future__

import base64
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openm6
from openm6.hub.deployments import Deployments
from openm6.hub.jobs import Jobs
from openm6.train.recipe import load_recipe
from tests.conftest import command
from tests.processes import free_port, run_openm6
from tests.tasks.conftest import picture
from tests.test_docs import openm6_words

SMALL = [
    "train.steps=2", "train.batch_size=2", "train.workers=0", "train.accumulate=1", "train.row_length=256",
    "evaluation.limit=2", "evaluation.every=2",
]  # fmt: skip
TINY = [
    "model.sizes.hidden_size=32", "model.sizes.num_hidden_layers=1", "model.sizes.intermediate_size=32",
    "model.sizes.num_attention_heads=4", "model.sizes.stem_widths=[8,8,8,8]",
]  # fmt: skip
"""Sizes of a network that a recipe begins."""

PHOTO = base64.b64encode(picture(40, 30)).decode()

REPLACED = {
    "MODEL": "runs/demo/model",
    "/path/to/Qwen3-0.6B": "qwen3",
    "/path/to/SmolLM2-135M-Instruct-Q8_0.gguf": "smollm2.gguf",
    "/path/to/adapter": "peft",
    '"photo": "..."': f'"photo": "{PHOTO}"',
    "base64,...": f"base64,{PHOTO}",
    "train.steps=500": "train.steps=2",
    "https://m6.example:8000": "http://127.0.0.1:8000",
}
"""What a page leaves open, or has too large for a test."""


class Walk:
    """The commands and Python examples of a page, with the servers that they start and the names that they define."""

    def __init__(self, folder: Path):
        self.names: dict[str, Any] = {"openm6": openm6}
        self.folder = folder
        self.key = "m6-..."
        """The key that the last `openm6 keys add` printed; it replaces the one that a page shows."""
        self._ports: dict[str, int] = {}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, words: list[str]) -> None:
        """Run one command; raises AssertionError with what it printed where it fails."""
        if (given := openm6_words(words)) is not None:
            quicker = _quicker(given[2:] if given[0] == "--extension" else given)
            names = {word.partition("=")[0] for word in quicker if "=" in word}
            given = [word for word in given if word.partition("=")[0] not in names] + quicker
            if given[0] == "serve":
                self.serve("8000", [sys.executable, "-m", "openm6", *given, "--port", str(self.port("8000"))])
            elif given[0] == "--extension":  # which registers for the whole process
                ended = run_openm6(*given)
                assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stderr[-2000:]}"
            elif given[0] in ("keys", "deploy"):  # which find the home directory as they are imported
                printed = self._call([sys.executable, "-m", "openm6", *given])
                if given[:2] == ["keys", "add"]:
                    self.key = printed.strip()
            else:
                done = command(*given)
                assert done.exit_code == 0, f"{' '.join(words)}\n{done.output[-2000:]}"
        elif "serve" in words:
            self.serve("8100", [sys.executable, *words[1:]])
        elif words[0] == "curl":
            self._call([*words, "--fail-with-body", "--silent", "--show-error"])
        else:
            assert Path(words[0]).name == "python", words
            self._call([sys.executable, *words[1:]])

    def _call(self, words: list[str]) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        return done.stdout

    def python(self, text: str, page: str) -> None:
        """Run an example among the names of those before it."""
        flags = __future__.annotations.compiler_flag
        before = list(sys.path)
        exec(compile(text, page, "exec", flags, dont_inherit=True), self.names)
        sys.path[:] = before

    def filled(self, text: str) -> str:
        """A word of a command, or an example, with what the page leaves open, and with free ports."""
        for shown, here in REPLACED.items():
            text = text.replace(shown, here)
        text = text.replace("m6-...", self.key)
        for shown in ("8000", "8100"):
            text = str(self.port(shown)) if text == shown else text
            text = text.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{self.port(shown)}")
        if "20261126-1430" in text:
            text = text.replace("20261126-1430", max(Jobs().list(), key=lambda job: job.created).id)
        return str(Path(text).expanduser()) if text.startswith("~/") else text

    def port(self, shown: str) -> int:
        """A free port in the place of one that the page shows."""
        if shown not in self._ports:
            self._ports[shown] = free_port()
        return self._ports[shown]

    def serve(self, shown: str, words: list[str]) -> None:
        """Start a server in the place of the one before it, and wait until it is ready."""
        self._stop(shown)
        log = self.folder / f"server-{shown}.log"
        with log.open("wb") as file:
            process = self._servers[shown] = subprocess.Popen(words, stdout=file, stderr=file)
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port(shown)}/readyz", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                lives = process.poll() is None and time.monotonic() < until
                assert lives, log.read_text("utf-8", "replace")[-2000:]
                time.sleep(0.1)

    def _stop(self, shown: str) -> None:
        if process := self._servers.pop(shown, None):
            process.terminate()
            process.wait(60)

    def close(self) -> None:
        for shown in list(self._servers):
            self._stop(shown)
        for deployment in Deployments().list():
            Deployments().stop(deployment.name)


def _quicker(given: list[str]) -> list[str]:
    """What a command is given besides, so that it takes seconds."""
    match given:
        case ["train", "codec_64" | "codec_256" as recipe, *_]:
            return [word for word in SMALL if "accumulate" not in word and "row_length" not in word] + _few(recipe)
        case ["train", "few_samples", *_]:
            return [*SMALL, *_few("few_samples")]
        case ["train", "quality.yaml", *_]:
            return SMALL
        case ["train", "judge", *_]:
            return [*SMALL, *TINY, *_few("judge")]
        case ["plan", "codec_256", *_]:
            return ["train.batch_size=1"]
        case ["train", "examples/search.yaml", *_]:
            return [*SMALL, *TINY, "vectors.dims=[16]"]
        case ["train", *_]:
            return [*SMALL, *TINY]
        case ["finetune", *_]:
            return [*SMALL[:3], "evaluation.limit=2"]
        case ["serve", *_]:
            return ["--linger", "0"]
        case ["jobs", "submit", *_]:
            return SMALL[:3]
        case ["jobs", "work"]:
            return ["--until-empty"]
        case ["eval", *words] if "--against" in words:  # vectors
            return ["--limit", "4"]
        case ["eval", *_]:
            return ["--limit", "4", "-o", "max_new_tokens=2"]
        case ["images", "measure", *_]:
            return ["--limit", "4"]
        case ["compress", *_] | ["cascade", "learn", *_]:
            return ["--steps", "2"]
    return []


def _few(recipe: str) -> list[str]:
    """Fewer of the pictures that a recipe of the package draws."""
    whole = load_recipe(recipe)
    sections = {"data": whole.data, "evaluation.data": whole.evaluation.data}
    return [
        f"{name}.{number}.source={section.source}?pictures=200"
        for name, every in sections.items()
        for number, section in enumerate(every)
        if section.source.startswith(("demo:", "scenes/"))
    ]

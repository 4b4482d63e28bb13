"""`pip install openm6` without extras: how large it is, and that it trains, loads and runs a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.train.conftest import SIZES

ROOT = Path(__file__).parents[2]
TORCH = "torch>=2.13,<2.14"
PACKAGES, BYTES = 60, 1.05e9
"""The bytes are without compiled bytecode."""
RECIPE = {
    "name": "tiny", "output": "run", "model": {"preset": "demo", "sizes": SIZES},
    "tokenizer": {"vocab_size": 800, "characters": 64, "num_codes": 16},
    "data": [{"source": "goods.jsonl", "task": "vqa"}],
    "evaluation": {"data": [{"source": "goods.jsonl", "task": "vqa"}], "every": 10, "limit": 8},
    "train": {"steps": 12, "batch_size": 8, "warmup": 2, "learning_rate": 1e-3, "workers": 0},
}  # fmt: skip


def link(name: str, site: Path) -> None:
    """A package of the environment of the tests, put into another one: quicker than unpacked again."""
    for file in distribution(name).files or ():
        if ".." not in file.parts and file.suffix != ".pyc":
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.locate(), site / file)
            except OSError:  # on another file system
                shutil.copyfile(file.locate(), site / file)


@pytest.mark.slow
def test_the_base_alone_is_small_and_trains_and_runs_a_model(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*words: object, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words], cwd=tmp_path, env={**clean, **changes}, capture_output=True, text=True
        )

    def done(*words: object) -> str:
        told = run(*words)
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    done(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    site = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    for name in ("pip", "torch"):
        link(name, site)
    pip = (python, "-m", "pip")
    done(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("openm6-*.whl")
    done(*pip, "install", "--quiet", "--no-compile", TORCH, wheel)
    packages = json.loads(done(*pip, "list", "--format", "json"))
    assert len(packages) <= PACKAGES, packages
    files = [path for path in (tmp_path / "venv").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= BYTES

    rows = []
    for answer, colour in {"红": (220, 30, 30), "蓝": (30, 30, 220)}.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{answer}.png")
        rows += [{"photo": f"{answer}.png", "question": "什么颜色？", "answer": answer}] * 16
    (tmp_path / "goods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    openm6 = python.with_name("openm6")
    told = run(openm6, "train", "recipe.yaml", OPENM6_CACHE=str(tmp_path / "cache"))
    assert told.returncode == 0, told.stderr
    assert "energy" in told.stderr and "pip install 'openm6[monitor]'" in told.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["finished"] and "energy_kwh" not in last
    assert done(openm6, "run", "run/model", "vqa", "photo=红.png", "question=什么颜色？").strip() in ("红", "蓝")
    code = "import openm6; print(openm6.load('run/model').run('vqa', photo='蓝.png', question='什么颜色？'))"
    assert done(python, "-c", code).strip() in ("红", "蓝")

    for words, extra in (
        (("serve", "run/model"), "serve"), (("demo",), "demo"), (("plan", "m6-base"), "monitor"),
        (("eval", "run/model", "--task", "vqa", "--data", "goods.jsonl", "--report", "report"), "eval"),
    ):  # fmt: skip
        told = run(openm6, *words)
        assert told.returncode == 2 and told.stderr.strip().endswith(f"pip install 'openm6[{extra}]'"), told.stderr

"""Measure what the base and each extra add to a new environment, and write docs/installation.md's table:
`python docs/gen_extras.py` (some minutes; needs a package index)."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from os import link
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "installation.md"
BEGIN, END = "<!-- EXTRAS -->\n", "<!-- END OF EXTRAS -->\n"
IMPORTS = {
    "parquet": "pyarrow.parquet", "edit": "scipy.ndimage", "monitor": "codecarbon, torch.utils.tensorboard",
    "eval": "sacrebleu, matplotlib.pyplot, markdown", "demo": "sklearn.datasets",
    "retrieve": "lancedb, faiss, lightgbm",
    "serve": "fastapi, uvicorn", "console": "gradio", "traces": "opentelemetry.sdk.trace", "hub": "mlflow",
    "ray": "ray", "gguf": "gguf", "edge": "onnx, onnxruntime", "lowbit": "torchao",
}  # fmt: skip
"""Modules of each extra whose import is timed: those that its first use imports."""


def run(*words: str | Path) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def measure(environment: Path) -> tuple[int, int]:
    """Packages, and bytes of the files."""
    packages = json.loads(run(environment / "bin" / "python", "-m", "pip", "list", "--format", "json"))
    files = (path for path in environment.rglob("*") if path.is_file() and not path.is_symlink())
    return len(packages), sum(path.stat().st_size for path in files)


def seconds(python: Path, modules: str, before: str = "torch") -> float:
    """The median time of three imports after `before`, each in a process of its own."""
    code = f"import {before}, time; a = time.perf_counter(); import {modules}; print(time.perf_counter() - a)"
    return statistics.median(float(run(python, "-c", code)) for _ in range(3))


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    torch = next(line for line in project["dependencies"] if line.startswith("torch"))
    rows = ["| extra | packages | MB | import, s |", "| --- | ---: | ---: | ---: |"]
    with TemporaryDirectory() as folder:
        base, other = Path(folder) / "base", Path(folder) / "other"
        run(sys.executable, "-m", "venv", base)
        run(base / "bin" / "python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
        (wheel,) = Path(folder).glob("openm6-*.whl")
        run(base / "bin" / "python", "-m", "pip", "install", "-q", torch, wheel)
        packages, size = measure(base)
        time = seconds(base / "bin" / "python", "torch", before="sys")
        rows.append(f"| (base) | {packages} | {size / 1e6:,.0f} | {time:.1f} (PyTorch) |")
        for extra, modules in IMPORTS.items():
            shutil.copytree(base, other, symlinks=True, copy_function=link)
            run(other / "bin" / "python", "-m", "pip", "install", "-q", torch, f"{wheel}[{extra}]")
            more, whole = measure(other)
            time = seconds(other / "bin" / "python", modules)
            rows.append(f"| {extra} | +{more - packages} | +{(whole - size) / 1e6:,.0f} | +{time:.1f} |")
            print(rows[-1], flush=True)
            shutil.rmtree(other)
    text = PAGE.read_text("utf-8")
    table = BEGIN + "\n" + "\n".join(rows) + "\n\n" + END
    PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: table, text, flags=re.S), "utf-8")


if __name__ == "__main__":
    main()

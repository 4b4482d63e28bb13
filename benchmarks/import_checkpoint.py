"""Seconds and peak memory of `openm6 models import`, and of the export back, on random checkpoints of Qwen3's shapes.

They are in bf16 and in four files. The peak is that of the resident set of a process that does nothing else (VmHWM of
Linux), its libraries included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import tokenizers
import torch
from torch import Tensor
from transformers import Qwen3Config

from openm6.model.files import write_shards, write_tensors
from openm6.weights.families import model_config, tensors

TITLE = "Import and export of an open checkpoint: time and peak memory"
SHARDS = 4
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The larger one needs 34 GB of disk for a while."""
_RUN = """
import sys, time
from pathlib import Path
from openm6.compress.convert import export_model, import_model
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
start, before = time.perf_counter(), peak()
source, output = map(Path, sys.argv[2:])
if sys.argv[1] == "import":
    import_model(source, output, "none", 1024, 1024)
else:
    export_model(source, output, "huggingface")
print(time.perf_counter() - start, before, peak())
"""


def run(shapes: dict[str, dict[str, Any]] | None = None, vocabulary: int = 151_936) -> tuple[list[dict[str, Any]], str]:
    rows = []
    for name, sizes in (shapes or SHAPES).items():
        with TemporaryDirectory() as folder:
            source, output = Path(folder) / "theirs", Path(folder) / "ours"
            start = time.perf_counter()
            size = _write(source, {**sizes, "vocab_size": vocabulary})
            written = time.perf_counter() - start
            largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
            seconds, before, peak = _measure("import", source, output)
            shutil.rmtree(source)
            back, _, back_peak = _measure("export", output, source)
            rows.append({
                "checkpoint": name, "GB": round(size / 1e9, 2), "largest file, GB": round(largest / 1e9, 2),
                "written at random, s": round(written, 1), "imported, s": round(seconds, 1),
                "GB/s": round(size / 1e9 / seconds, 2), "libraries, GB": round(before / 1e9, 2),
                "peak, GB": round(peak / 1e9, 2), "peak / largest file": round(peak / largest, 2),
                "exported, s": round(back, 1), "peak of the export, GB": round(back_peak / 1e9, 2),
            })  # fmt: skip
    return rows, "Random weights in bf16 and four files; the model directory that is written has as many bytes."


def _measure(what: str, source: Path, output: Path) -> list[float]:
    """Seconds, and the bytes of the peak before and after."""
    words = [sys.executable, "-c", _RUN, what, str(source), str(output)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return list(map(float, done.stdout.split()))


def _write(folder: Path, sizes: dict[str, Any]) -> int:
    """Bytes of a random checkpoint."""
    folder.mkdir()
    Qwen3Config(**sizes, head_dim=128).save_pretrained(folder)
    words = {f"<{number}>": number for number in range(sizes["vocab_size"] - 16)}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[])).save(str(folder / "tokenizer.json"))
    config = model_config(json.loads((folder / "config.json").read_text("utf-8")), folder / "config.json")
    wanted = {
        part.name: torch.empty(part.shape, dtype=torch.bfloat16, device="meta")
        for one in tensors(config) for part in one.parts
    }  # fmt: skip
    noise = (torch.randn(2**23) * 0.02).bfloat16()

    def chunks(name: str) -> Iterator[Tensor]:
        left = wanted[name].numel()
        while left:
            yield noise[:left]
            left -= min(left, len(noise))

    size = sum(tensor.nbytes for tensor in wanted.values())
    with patch("openm6.model.files.SHARD", size // SHARDS + size // 20):
        write_shards(folder, wanted, lambda file, part: write_tensors(file, part, chunks))
    return size

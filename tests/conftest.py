"""What several tests need: one seed, few threads, small networks and examples."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait take the cores from other tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest
import setuptools  # noqa: F401  PyTorch's compiler imports it, which fails where Python's own distutils was used before
import torch

from openm6.core.environment import CACHE
from openm6.core.images import ImageGrid
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE_BLOCKS, Picture, Sequence
from openm6.core.tokenizer import Tokenizer
from openm6.inference.session import Session
from openm6.model import M6, ModelConfig
from openm6.model.codec import Codec, CodecConfig
from openm6.tasks.library import get
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor

VOCABULARY = 97

# No test depends on time: a busy machine must not fail one.
hypothesis.settings.register_profile("openm6", deadline=None)
hypothesis.settings.load_profile("openm6")


def pytest_configure(config: pytest.Config) -> None:
    """Generated data is drawn once for all tests: the processes of the tests share a cache."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="openm6-cache-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[CACHE], ignore_errors=True))


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


EXPERTS = {"num_experts": 4, "experts_per_token": 2, "shared_intermediate_size": 16, "router": "prototype"}
"""Sizes that put experts into a tiny network."""


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
"""Scalings of rotary positions, each with frequencies that stay, that are scaled, and that lie between."""


def tiny_config(**changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "image_embedder": "patch",
        "image_patch": 8,
        "image_max_patches": 16,
    }
    return ModelConfig(**{**sizes, **changes})


def tiny_model(**changes: object) -> M6:
    """A small network whose norms, biases and places are random too, so that leaving one out shows."""
    model = M6(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "image" not in name:
                parameter.mul_(4)
    return model


def example(
    rng: np.random.Generator, source: int, target: int, pictures: tuple[tuple[int, int], ...] = (), patch: int = 8,
    read: str = "bidirectional",
) -> Sequence:  # fmt: skip
    """Random ids: `pictures` (rows, columns of patches), then `source` tokens, then `target` causal ones. `read`: how
    the model reads pictures and source."""
    images, length = [], 0
    for rows, columns in pictures:
        pixels = rng.integers(0, 256, (rows * patch, columns * patch, 3), dtype=np.uint8)
        images.append(Picture(pixels, length, rows * columns))
        length += rows * columns
    total = length + source + target
    ids = rng.integers(1, VOCABULARY, total).astype(np.int32)
    is_source = np.arange(total) < length + source
    blocks = np.where(is_source, SOURCE_BLOCKS[read], CAUSAL).astype(np.int32)
    labels = np.where(~is_source, rng.integers(1, VOCABULARY, total), IGNORE).astype(np.int32)
    return Sequence(ids, blocks, labels, images, task="t", origin="o")


def drawing_session(max_length: int = 256, tasks: tuple[str, ...] = (), **sizes: object) -> Session:
    """A model that draws pictures of 16 x 16 pixels by 4 x 4 codes; it says of itself that it was trained on tasks.
    `sizes` as of `tiny_config`."""
    torch.manual_seed(0)
    codec = Codec(CodecConfig(image_size=16, patch=2, widths=[8, 16], levels=[4, 4]))
    tokenizer = Tokenizer.train(["画一张图: 红色的杯子", "参考 风格 草图"], 600, 16)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_codes=16, **sizes)
    grid = ImageGrid(config.image_stride, config.image_max_patches)
    processor = Processor(tokenizer, grid, max_length, PictureCodec(codec), source=config.source)
    return Session(M6(config).eval(), processor, map(get, tasks))


def command(*words: object) -> Any:
    """The result of a command; what it raises is raised."""
    from typer.testing import CliRunner

    from openm6.cli import commands

    result = CliRunner().invoke(commands(), list(map(str, words)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file of this process can grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class ExactSession(Session):
    """A session that computes in fp32, as an ONNX bundle and transformers do, on a machine with bf16 units too."""

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()


def exact(session: Session) -> ExactSession:
    return ExactSession(session.model, session.processor, session.tasks.values(), session.path)

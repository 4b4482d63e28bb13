"""Model directories made from others: an imported Qwen3 checkpoint, a dense model with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openm6.atomic import require_new, write_whole
from openm6.bundle import Bundle
from openm6.images import ImageGrid
from openm6.model.imports import import_qwen3, read_config
from openm6.model.upcycle import upcycle
from openm6.tasks.processor import Processor
from openm6.tokenizer import Tokenizer


def import_bundle(path: Path, output: Path, image_embedder: str, num_codes: int, max_length: int) -> Bundle:
    """A model directory whose backbone has the weights of a Qwen3 checkpoint; the image embedder starts at random.

    Raises UsageError for a checkpoint that cannot be imported or an `output` that exists.
    """
    require_new(output)
    changes: dict[str, Any] = {"image_embedder": image_embedder, "num_codes": num_codes}
    tokenizer = Tokenizer.wrap(path, num_codes, start_at=read_config(path, **changes).vocab_size)
    torch.manual_seed(0)
    model = import_qwen3(path, vocab_size=tokenizer.vocab_size, **changes)
    grid = ImageGrid(model.config.image_stride, model.config.image_max_patches)
    bundle = Bundle(model, Processor(tokenizer, grid, max_length))
    write_whole(output, bundle.save)
    return bundle


def upcycle_bundle(path: Path, output: Path, num_experts: int, chosen: int, router: str, interval: int) -> Bundle:
    """A model directory with experts in the place of the feed-forwards of the dense one at `path`."""
    require_new(output)
    bundle = Bundle.load(path, device="cpu", trainable=True)
    torch.manual_seed(0)
    bundle.model = upcycle(bundle.model, num_experts, chosen, router, interval)
    write_whole(output, bundle.save)
    return bundle

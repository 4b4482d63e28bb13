"""Open text checkpoints, and their weights written as those of a model directory.

Nothing is unpickled. Sizes in headers are compared with the files before anything is allocated, and tensors are read by
rows, so that an import needs memory for a chunk of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from openm6.core.errors import UsageError
from openm6.model.config import ModelConfig
from openm6.model.embed import ImageEmbedder
from openm6.model.files import meta_model, write_shards, write_tensors
from openm6.weights.checkpoint import Checkpoint
from openm6.weights.families import Joined, tensors
from openm6.weights.gguf_file import MAGIC, open_gguf
from openm6.weights.huggingface import PICKLED, is_pickled, open_huggingface

_GROWING = ("embed.weight", "head.weight")


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises UsageError for what cannot be imported, by the key of its configuration, OpenM6Error for damaged files."""
    if path.is_dir():
        return open_huggingface(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return open_gguf(path)
        if path.suffix in PICKLED:
            raise is_pickled(path)
    raise UsageError(f"{path} is not a checkpoint: give a directory with config.json and safetensors, or a GGUF file.")


def import_weights(
    checkpoint: Checkpoint, config: ModelConfig, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Write the safetensors files of a network of `config`: that of the checkpoint, which may have a larger vocabulary
    and an image encoder. `progress` gets the megabytes written and their total.

    Each tensor has the precision that it has in the checkpoint. The old rows of the embedding (and head) stay as they
    are; new ones start at the mean of the old ones plus noise, so that they are neither likely nor out of scale. The
    image encoder starts at random.
    """
    joined = {one.name: one for one in tensors(checkpoint.config)}
    image = _image_weights(config)
    wanted = {name: torch.empty_like(tensor, device="meta") for name, tensor in image.items()}
    for name, one in joined.items():
        dtypes = [checkpoint.find(part).dtype for part in one.parts]
        shape = (config.vocab_size, *one.shape[1:]) if name in _GROWING else one.shape
        wanted[name] = torch.empty(shape, dtype=reduce(torch.promote_types, dtypes), device="meta")
    total, done = sum(tensor.nbytes for tensor in wanted.values()), 0

    def chunks(name: str) -> Iterator[Tensor]:
        nonlocal done
        values = iter([image[name]]) if name in image else _read(checkpoint, joined[name])
        if name in _GROWING:
            values = _grown(values, config.vocab_size)
        for chunk in values:
            chunk = chunk.to(wanted[name].dtype)
            yield chunk
            done += chunk.nbytes
            progress(done // 10**6, total // 10**6)

    write_shards(folder, wanted, lambda file, part: write_tensors(file, part, chunks))


def _read(checkpoint: Checkpoint, joined: Joined) -> Iterator[Tensor]:
    for part in joined.parts:
        # A chunk has whole heads, whose rows may be in another order.
        yield from checkpoint.find(part).chunks(checkpoint.config.head_dim)


def _grown(values: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """Chunks of a matrix, and after them as many rows as it lacks."""
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for chunk in values:
        count, total = count + len(chunk), total + chunk.sum(0, dtype=torch.float64)
        squares = squares + torch.linalg.vector_norm(chunk, dtype=torch.float64) ** 2
        yield chunk
    if count < rows:
        mean, size = total / count, count * len(total)
        deviation = ((squares - size * mean.mean() ** 2) / (size - 1)).sqrt()
        noise = torch.randn(rows - count, len(mean), generator=torch.Generator().manual_seed(0))
        yield mean.float() + noise * deviation.float() * 0.1


def _image_weights(config: ModelConfig) -> dict[str, Tensor]:
    if config.image_embedder == "none":
        return {}
    model = meta_model(config)
    torch.manual_seed(0)
    model.image = ImageEmbedder(config)
    model.reset_parameters()  # of what has memory
    return dict(model.image.state_dict(prefix="image."))

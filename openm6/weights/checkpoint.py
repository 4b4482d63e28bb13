"""What an open text checkpoint consists of, whatever the form of its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from openm6.core.errors import OpenM6Error
from openm6.model.config import ModelConfig
from openm6.weights.chat_files import CheckpointChat
from openm6.weights.families import Part, tensors

CHUNK = 2**23
"""Numbers that are read at once, about."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read by rows, none of which stays in memory.

    row_bytes   bytes of a row, the values at one index of the first dimension
    widen       from bytes, uint8 [rows, row_bytes], to values [rows, ...] of `dtype`; None: they are the values
    """

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int
    widen: Callable[[np.ndarray], Tensor] | None = None

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first to last - 1. Raises OpenM6Error where the file ends before them."""
        size = (last - first) * self.row_bytes
        data = np.fromfile(self.file, np.uint8, size, offset=self.offset + first * self.row_bytes)
        if len(data) < size:
            raise OpenM6Error(f"{self.file} ends within the tensor {self.name}.")
        data = data.reshape(last - first, self.row_bytes)
        values = torch.from_numpy(data).view(self.dtype) if self.widen is None else self.widen(data)
        return values.view(last - first, *self.shape[1:])

    def chunks(self, multiple: int = 1) -> Iterator[Tensor]:
        """All rows, in chunks of a multiple of so many."""
        step = max(1, CHUNK // (math.prod(self.shape[1:]) * multiple)) * multiple
        for first in range(0, self.shape[0], step):
            yield self.rows(first, min(first + step, self.shape[0]))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are there, and have the shapes that its configuration gives.

    source   its directory or file
    config   its network, without image encoder
    find     the stored tensor of one of transformers' names
    fast     its tokenizer
    origin   its name and licence (origin.py)
    chat     how it is asked, by its tokenizer (chat_files.py); None: it has no chat template
    kept     keys of its configurations that a model directory has no other place for, and an export writes again:
             `config` (families.kept_keys), `tokenizer_config`, and, of an adapter, `adapter_config` (lora.py)
    """

    source: Path
    config: ModelConfig
    find: Callable[[Part], Stored]
    fast: Callable[[], tokenizers.Tokenizer]
    origin: dict[str, str]
    chat: Callable[[tokenizers.Tokenizer], CheckpointChat | None]
    kept: dict[str, Any]


def check_tensors(source: Path, config: ModelConfig, names: Iterable[str], find: Callable[[Part], Stored]) -> None:
    """Raises OpenM6Error for a tensor that is missing, has another shape, or has no place in the network."""
    used = set()
    for joined in tensors(config):
        for part in joined.parts:
            stored = find(part)
            used.add(stored.name)
            if stored.shape != part.shape:
                raise OpenM6Error(
                    f"{source}: {stored.name} has the shape {list(stored.shape)}; by its configuration it is "
                    f"{list(part.shape)}."
                )
    if extra := sorted(set(names) - used):
        raise OpenM6Error(f"{source} holds {extra[0]} (and {len(extra) - 1} more), which cannot be imported.")

"""What a model's process serves, and how much it does at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """How much the engine does at once.

    capacity       positions of a text with its prompt; 0: as many as the model has
    cache_mib      memory for keys and values of texts that are written, and as much for those of pictures and beams
    prefix_mib     for prompts that were read lately, and as much for features of pictures
    batch          alike requests that are worked at together (pictures, vectors)
    prefill        positions of prompts that are read at once, at most, while others write
    """

    capacity: int = 0
    cache_mib: int = 512
    prefix_mib: int = 64
    batch: int = 16
    prefill: int = 2048


@dataclass(frozen=True, slots=True)
class Place:
    """What a process serves: a model directory and adapters of it by name."""

    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)

"""Settings of a model's process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the engine.

    capacity       maximum number of positions of a text with its prompt; 0: the model's
    cache_mib      memory for keys and values of texts in progress, and as much for those of jobs (pictures, beams)
    prefix_mib     memory for recently read prompts, and as much for features of recent pictures
    batch          maximum number of requests in a job, and of prompts in a prefill
    prefill        maximum number of prompt positions that are read between two steps of the texts in progress
    """

    capacity: int = 0
    cache_mib: int = 512
    prefix_mib: int = 64
    batch: int = 16
    prefill: int = 2048


@dataclass(frozen=True, slots=True)
class Place:
    """The model directory that a process serves, and the directories of its adapters by name."""

    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)

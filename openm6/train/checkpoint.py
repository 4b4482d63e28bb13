"""Checkpoints of a running training: whole or not there at all.

    checkpoints/step-00000500/
        model/             a model directory (usable by itself)
        optimizer.safetensors  of all optimizers
        state.json         step, place in the data, counters

Each is written beside its place, flushed to the disk and renamed; a crash or a full disk leaves the older
checkpoints as they were. Tensors are safetensors; nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from openm6.atomic import write_whole
from openm6.errors import OpenM6Error


class Checkpoints:
    """The checkpoints of one run: `save`, `latest`, `restore`."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep

    def all(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(p for p in self.directory.glob("step-*") if (p / "state.json").is_file())

    def latest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def save(
        self, step: int, save_model: Callable[[Path], None], optimizers: list[Optimizer], state: dict[str, Any]
    ) -> Path:
        """`state` is anything JSON can hold; the random-number state is added."""
        target = self.directory / f"step-{step:08d}"

        def fill(draft: Path) -> None:
            save_model(draft / "model")
            save_file({"rng": torch.get_rng_state(), **_flatten(optimizers)}, draft / "optimizer.safetensors")
            (draft / "state.json").write_text(
                json.dumps({**state, "step": step, "optimizers": _names(optimizers)}), "utf-8"
            )

        write_whole(target, fill)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def restore(self, path: Path, model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
        """Load weights, optimizers and random numbers in place; returns the state that `save` was given."""
        try:
            weights: dict[str, Tensor] = {}
            for file in sorted((path / "model").glob("*.safetensors")):
                weights |= load_file(file)
            tensors = load_file(path / "optimizer.safetensors")
            state = json.loads((path / "state.json").read_text("utf-8"))
        except (OSError, SafetensorError, ValueError):
            raise OpenM6Error(f"The checkpoint {path} is damaged; delete it to go on from the one before.") from None
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise OpenM6Error(
                f"The checkpoint {path} does not fit this recipe's model: {line} "
                "Choose another output directory, or set the sizes back."
            ) from None
        made = state.pop("optimizers", None)
        if made != _names(optimizers):
            raise OpenM6Error(
                f"The checkpoint {path} was not made with this recipe's train.optimizer "
                f"({', '.join(_names(optimizers))}): choose another output directory, or set it back."
            )
        torch.set_rng_state(tensors.pop("rng"))
        _unflatten(optimizers, tensors)
        return state


def _names(optimizers: list[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _flatten(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """`{optimizer}.{parameter}.{name of the moment}` to tensor, the first two as numbers.

    Learning rates come from the schedule, not from here.
    """
    return {
        f"{which}.{index}.{name}": value.detach().cpu().contiguous()
        for which, optimizer in enumerate(optimizers)
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def _unflatten(optimizers: list[Optimizer], tensors: dict[str, Tensor]) -> None:
    contents = [{**optimizer.state_dict(), "state": defaultdict(dict)} for optimizer in optimizers]
    for key, tensor in tensors.items():
        which, index, name = key.split(".", 2)
        contents[int(which)]["state"][int(index)][name] = tensor
    for optimizer, content in zip(optimizers, contents, strict=True):
        optimizer.load_state_dict(content)

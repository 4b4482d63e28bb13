"""Opening a saved network, with errors that a user can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from openm6.errors import OpenM6Error
from openm6.model.config import ModelConfig
from openm6.model.m6 import M6


def load_model(path: Path) -> M6:
    """The network of a model directory (config.json and safetensors, in one file or in shards), fp32.

    Only safetensors are read: a pickled checkpoint can run code. Shapes that do not fit, and tensors that are
    missing or too many, are refused with the first of their names.
    """
    check_model(path)
    quietly()
    return M6.from_pretrained(path, use_safetensors=True, local_files_only=True)


def check_model(path: Path) -> ModelConfig:
    """The config of a model directory whose weights are as it asks for."""
    config = ModelConfig.from_pretrained(path)
    expected, found = shapes(config), _stored_shapes(path)
    for name, shape in expected.items():
        if name not in found:
            raise OpenM6Error(f"{path} does not hold {name} {list(shape)}, which its config.json asks for.")
        if found[name] != shape:
            raise OpenM6Error(
                f"{path}: {name} has the shape {list(found[name])}, but its config.json asks for {list(shape)}; "
                "config and weights are of different models."
            )
    extra = sorted(set(found) - set(expected))
    if extra:
        raise OpenM6Error(f"{path} holds {extra[0]} (and {len(extra) - 1} more), which its config.json does not know.")
    return config


@contextmanager
def stored_rows(path: Path) -> Iterator[Callable[[str, int, int], Tensor | None]]:
    """A function (name, first, last) to these rows of a stored tensor of a model directory, the others unread; None for
    a head's that is not there."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in _weight_files(path)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no dict)

        def rows(name: str, first: int, last: int) -> Tensor | None:
            if name.startswith("heads.") and name not in where:
                return None
            if name == "head.weight" and name not in where:  # the output matrix of a tied network is its embedding
                name = "embed.weight"
            return where[name].get_slice(name)[first:last]  # type: ignore[no-any-return]

        yield rows


_LAYER = re.compile(r"(?<=blocks\.)\d+(?=\.)")


def layer_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to; None outside of the blocks."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def shared_name(name: str, distinct: int) -> str:
    """The name that a tensor has in a network of `distinct` layers: layer i is there layer i mod distinct."""
    return _LAYER.sub(lambda found: str(int(found[0]) % distinct), name)


def meta_model(config: ModelConfig) -> M6:
    """A network with its shapes and without memory."""
    with torch.device("meta"):
        return M6(config)


def quietly() -> None:
    """transformers neither draws bars nor warns while it reads or writes a network."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor of a network, without allocating it."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        stored: dict[str, tuple[int, ...]] = {}
        for place in _weight_files(path):
            with safe_open(place, framework="pt") as file:
                stored.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118 (no dict)
        return stored
    except FileNotFoundError:
        raise OpenM6Error(f"{path} has no model.safetensors (pickled .bin or .pt checkpoints are not read).") from None
    except (SafetensorError, ValueError, KeyError):
        raise OpenM6Error(f"The weights in {path} are truncated or damaged.") from None


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    return [path / Path(name).name for name in sorted(names)]

"""Opening a saved network, with errors that a user can act on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from openm6.core.errors import OpenM6Error
from openm6.model.config import ModelConfig
from openm6.model.lowbit import is_scale, restored, shape_of
from openm6.model.m6 import M6
from openm6.model.network import Network, NetworkConfig, without_memory

N = TypeVar("N", bound=Network)

INDEX = "model.safetensors.index.json"
"""Which of several safetensors files holds each tensor."""
SHARD = 4 * 2**30
"""Bytes of a safetensors file, about, of a network that is written without being in memory."""


def load_model(path: Path) -> M6:
    """The network of a model directory, in fp32. Raises what `load_network` does."""
    return load_network(M6, path)


def load_network(kind: type[N], path: Path) -> N:
    """The network of a directory (config.json and safetensors, in one file or in shards), fp32.

    Only safetensors are read: a pickled checkpoint can run code. Shapes that do not fit, and tensors that are
    missing or too many, are refused with the first of their names.
    """
    config = check_model(path, kind)
    model = meta_model(config, kind)
    with open_tensors(path) as where:

        def read(name: str) -> Tensor:
            if name not in where:
                raise OpenM6Error(f"{path} does not hold {name}, without which its weights mean nothing.")
            return where[name].get_tensor(name)  # type: ignore[no-any-return]

        few = getattr(config, "weight_bits", None) is not None
        state = {name: restored(name, read) if few else read(name) for name in model.state_dict()}
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()}, assign=True)
    return model


def save_network(model: Network, path: Path, max_shard_size: str = "4GB") -> None:
    """Write config.json and the weights of a network, in several files where they are larger than that."""
    from huggingface_hub import save_torch_state_dict

    model.config.save(path)
    save_torch_state_dict(model.state_dict(), path, max_shard_size=max_shard_size)


def read_config(path: Path) -> ModelConfig:
    """The config of a model directory. Raises what `NetworkConfig.load` does."""
    return ModelConfig.load(path)


def check_model(path: Path, kind: type[Network] = M6) -> Any:
    """The config of a model directory whose weights are as it asks for."""
    config = kind.config_class.load(path)
    expected, found = shapes(config, kind), _stored_shapes(path)
    if getattr(config, "weight_bits", None) is not None:
        found = {name: shape for name, shape in found.items() if not is_scale(name)}
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
def open_tensors(path: Path) -> Iterator[dict[str, Any]]:
    """The open safetensors file that holds each stored tensor of a directory, in one file or in shards. Raises
    OpenM6Error where there is none, or one is damaged."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Any] = {}
    with ExitStack() as stack:
        try:
            for file in weight_files(path):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                found |= dict.fromkeys(opened.keys(), opened)
        except (SafetensorError, OSError):
            raise OpenM6Error(f"The weights in {path} are truncated or damaged.") from None
        yield found


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory. Raises OpenM6Error for a missing one."""
    index = path / INDEX
    if not index.is_file():
        if not (path / "model.safetensors").is_file():
            raise OpenM6Error(f"{path} has no model.safetensors (pickled .bin or .pt checkpoints are not read).")
        return [path / "model.safetensors"]
    try:
        names = sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OpenM6Error(f"{index} is damaged.") from None
    for name in names:
        if not (path / name).is_file():
            raise OpenM6Error(f"{path} has no {name}, which its {INDEX} names: bring all of its files.")
    return [path / name for name in names]


def write_shards(path: Path, tensors: Mapping[str, Tensor], write: Callable[[Path, dict[str, Tensor]], None]) -> None:
    """Let `write` write each safetensors file of a directory, given the tensors in it (on the device meta: their shapes
    and dtypes alone), and write the index, where there are several files."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD)
    for name, part in split.filename_to_tensors.items():
        write(path / name, {key: tensors[key] for key in part})
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(content), "utf-8")


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip


def write_tensors(file: Path, tensors: Mapping[str, Tensor], chunks: Callable[[str], Iterable[Tensor]]) -> None:
    """Write a safetensors file with no more than a chunk of it in memory. `tensors` have shapes and dtypes alone;
    `chunks` gives the values of one by rows, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place, order = 0, sorted(tensors, key=lambda name: -tensors[name].itemsize)  # so that all are aligned
    for name in order:
        start, place = place, place + tensors[name].nbytes
        shape, dtype = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, place]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in chunks(name):
                out.write(chunk.contiguous().view(-1).view(torch.uint8).numpy().data)


def image_encoder_id(path: Path) -> str:
    """A name for how a model directory reads pictures: alike for the same weights, and "" where it reads none."""
    digest, found = hashlib.sha256(), False
    with open_tensors(path) as where:
        for name in sorted(where):
            if name.startswith("image."):
                found, tensor = True, where[name].get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16] if found else ""


@contextmanager
def stored_rows(path: Path) -> Iterator[Callable[[str, int, int], Tensor | None]]:
    """A function (name, first, last) to these rows of a stored tensor of a model directory, the others unread; None for
    a tensor that is not there."""
    with open_tensors(path) as where:

        def rows(name: str, first: int, last: int) -> Tensor | None:
            if name == "head.weight" and name not in where:  # the output matrix of a tied network is its embedding
                name = "embed.weight"
            return where[name].get_slice(name)[first:last] if name in where else None

        yield rows


_LAYER = re.compile(r"(?<=blocks\.)\d+(?=\.)")


def layer_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to; None outside of the blocks."""
    found = _LAYER.search(name)
    return int(found[0]) if found else None


def shared_name(name: str, distinct: int) -> str:
    """The name that a tensor has in a network of `distinct` layers: layer i is there layer i mod distinct."""
    return _LAYER.sub(lambda found: str(int(found[0]) % distinct), name)


def meta_model(config: NetworkConfig, kind: type[Network] = M6) -> Any:
    """A network of this kind with its shapes and without memory."""
    with without_memory():
        return kind(config)  # type: ignore[call-arg]


def shapes(config: NetworkConfig, kind: type[Network] = M6) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor of a network, without allocating it."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config, kind).state_dict().items()}


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with open_tensors(path) as where:
        parts = {name: file.get_slice(name) for name, file in where.items()}
        return {name: shape_of(part.get_shape(), part.get_dtype()) for name, part in parts.items()}

"""Model directories: opened, and described.

    config.json, model.safetensors      the network, as transformers saves it
    tokenizer.json, tokenizer_config.json
    codec/                              the image codec of a model that generates images
    chat_template.jinja                 the chat template of an imported model, if it is asked by one
    openm6.json                         settings of the processor, the tasks of the training, the licence of an import
    recipe.yaml                         the recipe of the training, if any

A directory with an adapter (model/adapters.py) has openm6.json and the adapter; the rest is its base model's.
Nothing in it is unpickled and no code in it is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from openm6.core.bases import base_of
from openm6.core.errors import UsageError
from openm6.core.files import write_json
from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.model import M6, ModelConfig
from openm6.model.adapters import lay_beside, merge_adapter
from openm6.model.changed import Active
from openm6.model.cpu.pack import pack_for_cpu
from openm6.model.files import check_model, load_model, meta_model, read_config
from openm6.model.precision import fast_dtype
from openm6.tasks.card import (
    read_card,
    read_chat,
    read_checkpoint,
    read_origin,
    read_seen_tokens,
    write_card,
)
from openm6.tasks.chat import ChatFormat
from openm6.tasks.pictures import PictureCodec
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.weights.chat_files import GENERATION
from openm6.weights.origin import copy_papers

CODEC = "codec"
"""Folder of the image codec of a model that generates images."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Several adapters beside one network: the active one, and the tasks and the chat form of each."""

    active: Active
    tasks: dict[str, list[Task]]
    chats: dict[str, ChatFormat | None]


class Opened(NamedTuple):
    model: M6
    processor: Processor
    tasks: list[Task]
    adapters: Adapters | None


def open_directory(path: Path, device: torch.device, trainable: bool, adapters: Mapping[str, str | Path]) -> Opened:
    """See Session.load."""
    processor, tasks = open_processor(path)
    place = base_of(path) or path
    if trainable and read_config(place).weight_bits:
        raise UsageError(f"{place} has quantized weights, which cannot be trained: take the original model.")
    model = meta_model(check_model(place)) if device.type == "meta" else load_model(place).eval()
    if place != path:
        model = merge_adapter(model, path).eval()
    beside = _beside(place, model, {name: Path(directory) for name, directory in adapters.items()})
    model.to(device)  # type: ignore[arg-type]
    if not trainable and device.type == "cuda":
        model.to(fast_dtype("cuda"))  # type: ignore[arg-type]
    elif not trainable:
        pack_for_cpu(model)
    return Opened(model, processor, tasks, beside)


def open_processor(path: Path) -> tuple[Processor, list[Task]]:
    """The processor and the tasks of a model, or of an adapter and its base; no weights are loaded."""
    tasks, length, prompt = read_card(path)
    place = base_of(path) or path
    codec = PictureCodec.load(place / CODEC) if (place / CODEC).is_dir() else None
    tokenizer, chat = Tokenizer.load(place), read_chat(path)
    if chat is None and tokenizer.ends:  # an adapter that leaves its base's chat template out
        tokenizer = tokenizer.with_ends(())
    made = make_processor(read_config(place), tokenizer, length, codec, prompt, read_seen_tokens(path))
    return replace(made, origin=read_origin(path), checkpoint=read_checkpoint(path), chat=chat), tasks


def make_processor(
    config: ModelConfig, tokenizer: Tokenizer, max_length: int, codec: PictureCodec | None = None, prompt: int = 0,
    seen_tokens: frozenset[int] | None = None,
) -> Processor:  # fmt: skip
    """The processor of a network of this configuration."""
    grid = ImageGrid(config.image_stride, config.image_max_patches)
    return Processor(tokenizer, grid, max_length, codec, prompt, seen_tokens, config.source)


def describe(
    path: Path,
    model: M6,
    processor: Processor,
    tasks: Iterable[Task],
    adapter: Any = None,
    made_from: Path | None = None,
) -> None:
    """Write all of a model directory but the weights; with the configuration of an `adapter`, of one that holds that
    adapter. `made_from`: the directory whose licence files go along."""
    path.mkdir(parents=True, exist_ok=True)
    if made_from is not None:
        copy_papers(made_from, path)
    if adapter is not None:
        adapter.save_pretrained(path)
    else:
        model.config.save(path)
        processor.tokenizer.save(path)
        if processor.codec is not None:
            processor.codec.save(path / CODEC)
        if generation := (processor.checkpoint or {}).get("generation_config"):
            write_json(path / GENERATION, generation)
    write_card(path, processor, tasks)


def _beside(base: Path, model: M6, directories: dict[str, Path]) -> Adapters | None:
    """Put adapters into the network. Raises UsageError for one of another model, or that has to be opened alone."""
    if not directories:
        return None
    for name, path in directories.items():
        if not name.isidentifier():
            raise UsageError(f"{name!r} cannot name an adapter: take letters, digits and _, a letter first.")
        beneath = base_of(path)
        if beneath is None or beneath.resolve() != base.resolve():
            of = f"one of {beneath}" if beneath else "none at all"
            raise UsageError(f"{path} is no adapter of {base}: it is {of}.")
    tasks = {name: read_card(path)[0] for name, path in directories.items()}
    chats = {name: read_chat(path) for name, path in directories.items()}
    for name, chat in chats.items():
        if (chat is None) != (read_chat(base) is None):
            raise UsageError(
                f"{directories[name]} is asked in another form than {base} (prompt_format): open it alone."
            )
    return Adapters(lay_beside(model, directories), tasks, chats)

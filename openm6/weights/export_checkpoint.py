"""Model directories as open checkpoints, and checkpoints written as directories of Hugging Face's form.

A model directory and its export hold the same rows under other names (families.py), so that tensors are copied by rows
and an export needs memory for a chunk of them alone. Rows of the vocabulary that OpenM6 added and nobody trained are
left out, so that a model that was imported and is exported has its old vocabulary.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openm6._version import __version__
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.files import write_json
from openm6.core.tokenizer import SPECIAL, Tokenizer
from openm6.model import ModelConfig
from openm6.model.adapters import check_whole
from openm6.model.files import check_model, shared_name, write_shards, write_tensors
from openm6.tasks.card import read_card, read_checkpoint, read_origin, read_seen_tokens
from openm6.tasks.chat import TEMPLATE
from openm6.weights.chat_files import GENERATION, json_of
from openm6.weights.checkpoint import Checkpoint, Stored
from openm6.weights.directory import CODEC
from openm6.weights.families import tensors, their_config
from openm6.weights.huggingface import stored_tensors
from openm6.weights.origin import copy_papers, model_card

_log = logging.getLogger(__name__)

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

Progress = Callable[[int, int], None]
"""Gets the megabytes that are done, and their total."""


class Exported(NamedTuple):
    """A model directory as a checkpoint, transformers' configuration of it, and the id of OpenM6's token that ends its
    answers, where it has been trained."""

    checkpoint: Checkpoint
    config: Any
    end_id: int | None


def open_model(path: Path) -> Exported:
    """A model directory as the checkpoint that an export of it is. Says in the log what has no place there: image
    encoder, image codec, task heads. Raises UsageError for what no family expresses, for quantized weights, and for an
    adapter."""
    check_whole(path)
    read_card(path)
    config: ModelConfig = check_model(path)
    if config.weight_bits:
        raise UsageError(f"{path} has weights in {config.weight_bits} bits: export the model that it was made from.")
    tokenizer, seen, kept = Tokenizer.load(path), read_seen_tokens(path), read_checkpoint(path) or {}
    rows = kept_rows(tokenizer, seen)
    backbone = replace(config, vocab_size=rows, num_codes=0, image_embedder="none", heads={}, distinct_layers=None)
    end_id = tokenizer.end_id if tokenizer.first_new_id <= tokenizer.end_id < rows else None
    if "config" not in kept:
        kept = _own_keys(path, tokenizer, rows)
    theirs = their_config(backbone, kept["config"], path)
    theirs.eos_token_id = _ends(theirs.eos_token_id, end_id)
    _tell_left_out(path, config)
    stored = _their_tensors(path, config, backbone)
    origin = read_origin(path) or {}
    found = Checkpoint(
        path, backbone, lambda part: stored[part.name], lambda: tokenizer.without_new(rows), origin, lambda fast: None,
        kept,
    )  # fmt: skip
    return Exported(found, theirs, end_id)


def kept_rows(tokenizer: Tokenizer, seen: frozenset[int] | None) -> int:
    """Number of rows of the vocabulary in an export: up to the last of OpenM6's tokens that was trained, where those
    were appended to another vocabulary; without image codes."""
    if seen is None or tokenizer.code_start - tokenizer.first_new_id != len(SPECIAL):
        return tokenizer.code_start
    return max(tokenizer.first_new_id, *(number + 1 for number in seen if number < tokenizer.code_start))


def write_huggingface(exported: Exported, folder: Path, dtype: str | None, progress: Progress) -> None:
    """Write a directory as transformers' save_pretrained does, in another precision where one is given."""
    checkpoint, config, end_id = exported
    found = {part.name: checkpoint.find(part) for joined in tensors(checkpoint.config) for part in joined.parts}
    wanted = {
        name: torch.empty(one.shape, dtype=DTYPES[dtype] if dtype else one.dtype, device="meta")
        for name, one in found.items()
    }
    total, done = sum(tensor.nbytes for tensor in wanted.values()), 0

    def chunks(name: str) -> Iterator[Tensor]:
        nonlocal done
        for chunk in found[name].chunks():
            values = cast(chunk, wanted[name].dtype, name)
            yield values
            done += values.nbytes
            progress(done // 10**6, total // 10**6)

    write_shards(folder, wanted, lambda file, part: write_tensors(file, part, chunks))
    config.dtype = wanted["model.embed_tokens.weight"].dtype
    config.save_pretrained(folder)
    write_tokenizer(checkpoint, folder)
    generation = checkpoint.source / GENERATION
    if generation.is_file():
        content = json_of(generation)
        write_json(folder / GENERATION, content | {"eos_token_id": _ends(content.get("eos_token_id"), end_id)})
    write_papers(checkpoint, folder, "transformers")


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where the model has one, the chat template."""
    checkpoint.fast().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", checkpoint.kept["tokenizer_config"])
    if (checkpoint.source / TEMPLATE).is_file():
        shutil.copy(checkpoint.source / TEMPLATE, folder / TEMPLATE)


def write_papers(checkpoint: Checkpoint, folder: Path, library: str, more: str = "") -> None:
    """Write the model card and copy licence files."""
    tasks, _, _ = read_card(checkpoint.source)
    lines = [f"Written by OpenM6 {__version__}.{more}"]
    if tasks:
        lines += ["", "Tasks that it was trained on:", "", *(f"- `{task.instructions[0]}`" for task in tasks)]
    card = model_card(checkpoint.origin, checkpoint.source.resolve().name, library, "\n".join(lines))
    (folder / "README.md").write_text(card, "utf-8")
    copy_papers(checkpoint.source, folder)


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in another precision. Raises OpenM6Error for one that is beyond the numbers of fp16."""
    made = values.to(dtype)
    if dtype == torch.float16 and bool((made.isinf() & ~values.isinf()).any()):
        raise OpenM6Error(f"{name} has numbers that f16 cannot hold (above 65504): export it as bf16.")
    return made


def _their_tensors(path: Path, config: ModelConfig, backbone: ModelConfig) -> dict[str, Stored]:
    """The stored rows that each of their tensors consists of, by its name."""
    stored, found = stored_tensors(path), {}
    for joined in tensors(backbone):
        one = stored[shared_name(joined.name, config.distinct_layers or config.num_hidden_layers)]
        offset = one.offset
        for part in joined.parts:
            size = math.prod(part.shape[1:]) * one.dtype.itemsize
            found[part.name] = Stored(joined.name, one.file, offset, part.shape, one.dtype, size)
            offset += part.shape[0] * size
    return found


def _own_keys(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Keys of transformers' configurations for a model that began at random."""
    given = {key: value for key, value in json_of(path / "tokenizer_config.json").items() if key != "num_codes"}
    known = tokenizer.without_new(rows)
    given = {
        key: value for key, value in given.items()
        if not key.endswith("_token") or known.token_to_id(str(value)) is not None
    }  # fmt: skip
    end_id, pad_id = (one if one < rows else None for one in (tokenizer.end_id, tokenizer.pad_id))
    ids = {"bos_token_id": None, "eos_token_id": end_id, "pad_token_id": pad_id}
    return {"config": ids, "tokenizer_config": given}


def _ends(ids: Any, end_id: int | None) -> Any:
    """The ids that end a text, with one more."""
    every = [*(ids if isinstance(ids, list) else [] if ids is None else [ids])]
    if end_id is None or end_id in every:
        return ids
    return [*every, end_id] if every else end_id


def _tell_left_out(path: Path, config: ModelConfig) -> None:
    left_out = {
        "its image encoder": config.image_embedder != "none", "its image codec": (path / CODEC).is_dir(),
        f"its heads ({', '.join(config.heads or {})})": bool(config.heads),
    }  # fmt: skip
    if told := [what for what, there in left_out.items() if there]:
        _log.warning("The export of %s reads and writes texts alone: %s stay behind.", path, " and ".join(told))

"""Directories of Hugging Face's form: config.json, safetensors in one file or in shards, tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.tokenizer import open_fast
from openm6.model.files import open_tensors, weight_files
from openm6.weights.chat_files import GENERATION, json_of, read_chat
from openm6.weights.checkpoint import Checkpoint, Stored, check_tensors
from openm6.weights.families import Part, kept_keys, model_config
from openm6.weights.origin import read_origin

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_huggingface(path: Path) -> Checkpoint:
    """Raises what `open_checkpoint` does."""
    if not (path / "config.json").is_file():
        if files := sorted(path.glob("*.gguf")):
            raise UsageError(f"{path} has no config.json, but GGUF files: import one of them, such as {files[0]}.")
        raise UsageError(f"{path} has no config.json: give the directory of a Hugging Face checkpoint.")
    theirs = json_of(path / "config.json")
    config = model_config(theirs, path / "config.json")
    if not any(path.glob("*.safetensors*")) and (pickled := [f for f in path.iterdir() if f.suffix in PICKLED]):
        raise is_pickled(min(pickled))
    stored = stored_tensors(path)

    def find(part: Part) -> Stored:
        if part.name not in stored:
            raise OpenM6Error(f"{path} has no tensor {part.name}.")
        return stored[part.name]

    tied = config.tie_word_embeddings and "lm_head.weight" in stored
    ignored = {"lm_head.weight"} if tied else set()
    names = (n for n in stored if n not in ignored and not n.endswith("rotary_emb.inv_freq"))
    check_tensors(path, config, names, find)
    if tied and not _equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
        raise UsageError(
            f"{path / 'config.json'}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight."
        )
    kept = {
        "config": kept_keys(theirs, path / "config.json"), "tokenizer_config": _tokenizer_config(path),
        "generation_config": json_of(path / GENERATION),
    }  # fmt: skip
    return Checkpoint(
        path, config, find, lambda: open_fast(path), read_origin(path), lambda fast: read_chat(path, fast), kept
    )


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """The special tokens by name, and what else transformers' class is told; tokenizer.json has all tokens."""
    names = ("special_tokens_map.json", "tokenizer_config.json")  # older and newer versions
    found = {key: value for name in names if (path / name).is_file() for key, value in json_of(path / name).items()}
    return {
        key: value for key, value in found.items() if key not in ("added_tokens_decoder", "auto_map", "chat_template")
    }


def stored_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of safetensors files, whose headers the library checks."""
    found = {}
    with open_tensors(path) as where:
        entries = {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name, file in where.items()
        }
    for file in weight_files(path):
        for name, offset in _offsets(file).items():
            kind, shape = entries[name]
            if kind not in _DTYPES:
                raise UsageError(f"{path}: {name} is of the type {kind}; only {', '.join(_DTYPES)} can be imported.")
            row = _DTYPES[kind].itemsize * int(np.prod(shape[1:], dtype=object))
            found[name] = Stored(name, file, offset, tuple(shape), _DTYPES[kind], row)
    return found


def _offsets(file: Path) -> Mapping[str, int]:
    """Where the tensors of a safetensors file begin; the library has checked its header."""
    with file.open("rb") as data:
        size = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _equal(one: Stored, other: Stored) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, 2**24 // one.row_bytes)
    spans = [(first, min(first + step, one.shape[0])) for first in range(0, one.shape[0], step)]
    return all(torch.equal(one.rows(*span), other.rows(*span)) for span in spans)


def is_pickled(file: Path) -> UsageError:
    return UsageError(
        f"{file} is pickled: it can run code and is not read. Convert it where you trust it, by transformers' "
        "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(OUTPUT), and import the output."
    )


def is_pickled_adapter(file: Path) -> UsageError:
    return UsageError(
        f"{file} is pickled: it can run code and is not read. Convert it where you trust it, by PEFT's "
        "PeftModel.from_pretrained(MODEL, DIRECTORY).save_pretrained(OUTPUT), and import the output."
    )

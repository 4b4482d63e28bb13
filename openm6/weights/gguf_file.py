"""GGUF files of the families of families.py, as checkpoints.

The header is read here, with every count and length compared with the file before anything is allocated: the reader of
the package gguf trusts them, and takes 13 s and 170 MB for a vocabulary of 49,000 tokens. The names of tensors and the
numbers of quantized ones are that package's.

A quantized tensor (Q8_0, Q4_K, ...) is widened to fp32, in which its numbers are exact; F32, F16 and BF16 stay.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openm6.core.errors import OpenM6Error, UsageError, cut
from openm6.core.extras import require
from openm6.model.config import ModelConfig
from openm6.model.rotary import llama3_factors
from openm6.weights.chat_files import gguf_generation, make_chat
from openm6.weights.checkpoint import Checkpoint, Stored, check_tensors
from openm6.weights.families import EXPERT_KEYS, FAMILIES, Part, checked_config
from openm6.weights.gguf_tokenizer import gguf_tokenizer, special_tokens
from openm6.weights.origin import gguf_origin

KEYS = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base", "num_experts": "expert_count", "experts_per_token": "expert_used_count",
    "expert_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
"""Keys of ModelConfig, and those of a GGUF file, behind the name of its architecture."""
YARN_KEYS = {
    "factor": "rope.scaling.factor", "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow",
}  # fmt: skip
"""Likewise those of `rotary_scaling`."""
_SCALING = "rope.scaling.type"
_ALLOWED = {
    "attention.causal": True, "expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_gating_func": 1,
    "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip
"""Keys that say what holds anyway, with the value that does."""
_ABOUT = ("rope.scaling.finetuned",)
"""Keys that change nothing in the network."""
FACTORS = "rope_freqs.weight"
"""Tensor with the divisors of the frequencies of Llama 3.1 and later ones, [E / 2], instead of the keys for them."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What they are computed from, in all releases; `factor` is their maximum."""

MAGIC = b"GGUF"
HEADER = 256 * 2**20
"""Bytes of a header, at most."""
ITEMS = 2**22
"""Elements of an array in a header, at most: eight times those of the largest lists of merges."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def open_gguf(path: Path) -> Checkpoint:
    """Raises what `open_checkpoint` does."""
    require("gguf", "gguf")
    fields, stored = _read(path)
    architecture, parts = str(fields.get("general.architecture")), fields.get("split.count", 1)
    known = dict.fromkeys(family.gguf for family in FAMILIES.values())
    if (kind := fields.get("general.type", "model")) != "model":
        raise _refusal(path, "general.type", kind, "only a model can be imported")
    if architecture not in known:
        raise _refusal(path, "general.architecture", architecture, f"what can be imported: {', '.join(known)}")
    if parts != 1:
        raise _refusal(path, "split.count", parts, "merge its files first (llama-gguf-split --merge)")
    config = _config(path, architecture, fields, stored)
    find = _finder(path, architecture, config, stored)
    check_tensors(path, config, (name for name in stored if name != FACTORS), find)
    kind = next(name for name, family in FAMILIES.items() if family.gguf == architecture)
    ids, names = special_tokens(fields)
    template, generation = names.pop("chat_template", None), gguf_generation(fields)
    kept = {"config": {"model_type": kind, **ids}, "tokenizer_config": names, "generation_config": generation}
    return Checkpoint(
        path, config, find, lambda: gguf_tokenizer(fields, path), gguf_origin(fields, path),
        lambda fast: make_chat(path, template, names, generation, fast) if template else None, kept,
    )  # fmt: skip


def _refusal(path: Path, key: str, value: Any, reason: str) -> UsageError:
    return UsageError(f"{path}: {cut(key)} is {cut(repr(value))}; {reason}.")


# Configuration


def _config(path: Path, architecture: str, fields: Mapping[str, Any], stored: Mapping[str, Stored]) -> ModelConfig:
    prefix = f"{architecture}."
    left = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}

    family = next(family for family in FAMILIES.values() if family.gguf == architecture)
    values: dict[str, Any] = dict(family.fixed)
    for ours, key in KEYS.items():
        if key in left and (ours not in EXPERT_KEYS or family.has_experts):
            value = values[ours] = _short(left.pop(key))
            whole = ours not in ("norm_eps", "rope_theta")
            least = 1 if ours == "rope_theta" else 0
            if type(value) not in ((int,) if whole else (int, float)) or not least < value < 2**31:
                raise _refusal(path, prefix + key, value, f"it has to be one number above {least}")
        elif ours in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "norm_eps"):
            raise OpenM6Error(f"{path} has no {prefix}{key}.")
    if family.has_experts:
        values["normalize_expert_weights"] = True  # in all GGUF files of the family
    if "token_embd.weight" not in stored:
        raise OpenM6Error(f"{path} has no tensor token_embd.weight.")
    values["vocab_size"] = stored["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in stored
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    allowed = _ALLOWED | {
        "vocab_size": values["vocab_size"], "attention.value_length": values["head_dim"],
        "rope.dimension_count": values["head_dim"], "attention.sliding_window": 0,
    }  # fmt: skip
    kind = left.pop(_SCALING, "none")
    if kind == "yarn":
        scaling = {ours: _short(left.pop(key)) for ours, key in YARN_KEYS.items() if key in left}
        values["rotary_scaling"] = {"rope_type": "yarn", **scaling}
    elif kind != "none":
        raise _refusal(path, prefix + _SCALING, kind, "only none and yarn can be imported")
    for key, value in left.items():
        if key not in allowed and key not in _ABOUT:
            raise _refusal(path, prefix + key, value, "this key cannot be imported")
        if key in allowed and value != allowed[key]:
            raise _refusal(path, prefix + key, value, f"only {allowed[key]!r} can be imported")
    if FACTORS in stored:
        if kind != "none":
            raise _refusal(path, prefix + _SCALING, kind, f"{FACTORS} scales the same positions")
        values["rotary_scaling"] = _llama3(path, stored[FACTORS], values)
    return checked_config(values, path)


def _llama3(path: Path, factors: Stored, values: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions that gives the divisors in the file. Raises UsageError for others."""
    width, theta = values["head_dim"], values.get("rope_theta", 10_000.0)
    if factors.shape == (width // 2,):
        found = factors.rows(0, width // 2).float()
        scaling = {"rope_type": "llama3", "factor": _short(float(found.max())), **_LLAMA3}
        if torch.allclose(found, llama3_factors(width, theta, scaling), rtol=1e-4, atol=0):
            return scaling
    raise UsageError(
        f"{path}: the divisors in {FACTORS} are not those of Llama 3.1 (low_freq_factor 1, high_freq_factor 4, "
        "original_max_position_embeddings 8192); others cannot be imported."
    )


def _short(value: Any) -> Any:
    """A number of fp32 as the decimal that it was written for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# Tensors


class Place(NamedTuple):
    """Where one of transformers' tensors is in a file.

    name     of the tensor
    expert   its number, of the weights of one: those of a layer lie in one tensor
    paired   whether the rows of a head are in the order of llama.cpp (see `_unpaired`)
    """

    name: str
    expert: int | None
    paired: bool


def placing(architecture: str) -> Callable[[Part], Place]:
    """The place of each tensor in files of an architecture."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, 1)

    def place(part: Part) -> Place:
        *before, last = part.name.split(".")
        expert = int(before.pop(-2)) if before[-3:-2] == ["experts"] else None
        layer = before[2] if before[1:2] == ["layers"] else ""
        name = f"{names.get_name('.'.join([*before[:2], '0', *before[3:]] if layer else before))}.{last}"
        paired = architecture == "llama" and before[-1] in ("q_proj", "k_proj")
        return Place(name.replace("blk.0.", f"blk.{layer}."), expert, paired)

    return place


def _finder(
    path: Path, architecture: str, config: ModelConfig, stored: Mapping[str, Stored]
) -> Callable[[Part], Stored]:
    place = placing(architecture)

    def find(part: Part) -> Stored:
        name, expert, paired = place(part)
        if name not in stored:
            raise OpenM6Error(f"{path} has no tensor {name}.")
        found = stored[name]
        if expert is not None:
            if found.shape != (config.num_experts, *part.shape):
                return found  # whose shape is refused
            offset = found.offset + expert * found.row_bytes
            return replace(found, shape=part.shape, offset=offset, row_bytes=found.row_bytes // part.shape[0])
        return replace(found, widen=_unpaired(found, config.head_dim)) if paired else found

    return find


def _unpaired(stored: Stored, width: int) -> Callable[[np.ndarray], Tensor]:
    """llama.cpp turns the pairs (2 i, 2 i + 1) of a Llama's heads, and its files have queries and keys in that order;
    here they are (i, i + width / 2)."""

    def widen(data: np.ndarray) -> Tensor:
        values = torch.from_numpy(data).view(stored.dtype) if stored.widen is None else stored.widen(data)
        return values.view(-1, width // 2, 2, *stored.shape[1:]).transpose(1, 2).contiguous()

    return widen


def _stored(name: str, path: Path, offset: int, shape: tuple[int, ...], kind: int) -> Stored:
    import gguf

    numbers = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[numbers]
    row = (math.prod(shape[1:]) if len(shape) > 1 else 1) * size // block
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(numbers.name)
    if plain is not None:
        return Stored(name, path, offset, shape, plain, row)

    def widen(data: np.ndarray) -> Tensor:
        return torch.from_numpy(gguf.dequantize(data.reshape(-1, shape[-1] // block * size), numbers))

    return Stored(name, path, offset, shape, torch.float32, row, widen)


# The header


class _Header:
    """A place in the header of a file, whose numbers are compared with the rest of it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.place = path, data, 0
        self.end = min(len(data), HEADER)

    def take(self, form: str) -> Any:
        """The next number, of a format of `struct`."""
        form = f"<{form}"
        self.check(1, struct.calcsize(form))
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return value

    def check(self, count: int, size: int) -> None:
        if count * size > self.end - self.place:
            raise OpenM6Error(
                f"{self.path} is damaged: at byte {self.place} its header has {count} items of {size} bytes or more, "
                f"and {self.end - self.place} bytes follow."
            )

    def text(self) -> str:
        count = self.take("Q")
        self.check(count, 1)
        value = self.data[self.place : self.place + count]
        self.place += count
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise OpenM6Error(f"{self.path} is damaged: before byte {self.place} stands no UTF-8.") from None

    def value(self, kind: int, inside: bool = False) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or inside:
            raise OpenM6Error(f"{self.path} is damaged: at byte {self.place} stands a value of the kind {kind}.")
        kind, count = self.take("I"), self.take("Q")
        self.check(count, struct.calcsize(_SCALARS.get(kind, "Q")))
        if count > ITEMS:
            raise OpenM6Error(f"{self.path} is damaged: at byte {self.place} stands an array of {count} values.")
        return [self.value(kind, inside=True) for _ in range(count)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors of a file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(path, data)
        header.place = 4
        if (version := header.take("I")) not in (2, 3):
            raise UsageError(f"{path} has the version {version} of GGUF; 2 and 3 can be imported.")
        count, pairs = header.take("Q"), header.take("Q")
        header.check(count, 24)
        header.check(pairs, 12)
        fields: dict[str, Any] = {}
        for _ in range(pairs):
            name = header.text()
            fields[name] = header.value(header.take("I"))
        entries = [_entry(header) for _ in range(count)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise OpenM6Error(f"{path} is damaged: general.alignment is {alignment!r}.")
        start = -(-header.place // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, shape, kind, offset, size in entries:
            if start + offset + size > len(data):
                raise OpenM6Error(f"{path} is truncated or damaged: the tensor {name} ends behind the end of the file.")
            found[name] = _stored(name, path, start + offset, shape, kind)
    if len(found) < count or len(fields) < pairs:
        raise OpenM6Error(f"{path} is damaged: it has two keys or two tensors of one name.")
    return fields, found


def _entry(header: _Header) -> tuple[str, tuple[int, ...], int, int, int]:
    """Name, shape, type, offset and bytes of the next tensor."""
    import gguf

    name, dims = header.text(), header.take("I")
    if not 1 <= dims <= 4:
        raise OpenM6Error(f"{header.path} is damaged: the tensor {name} has {dims} dimensions.")
    shape = tuple(reversed([header.take("Q") for _ in range(dims)]))
    kind, offset = header.take("I"), header.take("Q")
    try:
        numbers = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[numbers]
        if numbers.name not in ("F32", "F16", "BF16"):
            gguf.dequantize(np.zeros((1, size), np.uint8), numbers)  # are there functions for it?
    except (ValueError, KeyError, NotImplementedError):
        raise UsageError(
            f"{header.path}: the tensor {name} is of the type {kind} of GGML, which is not read."
        ) from None
    if 0 in shape or shape[-1] % block:
        raise OpenM6Error(f"{header.path} is damaged: the tensor {name} has the shape {list(shape)}.")
    return name, shape, kind, offset, math.prod(shape) // block * size

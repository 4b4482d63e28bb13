"""GGUF files of model directories: names, order of rows and metadata as llama.cpp's converter writes them
(convert_hf_to_gguf.py), by the package gguf."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openm6.core.errors import UsageError
from openm6.core.extras import require
from openm6.model.config import ModelConfig
from openm6.model.rotary import llama3_factors
from openm6.tasks.chat import TEMPLATE
from openm6.weights.checkpoint import Checkpoint, Stored
from openm6.weights.export_checkpoint import Exported, Progress, cast, write_papers
from openm6.weights.families import EXPERT_KEYS, FAMILIES, tensors
from openm6.weights.gguf_file import FACTORS, KEYS, YARN_KEYS, placing
from openm6.weights.gguf_tokenizer import gguf_fields

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_ROUTER = "ffn_gate_inp.weight"
_FLOATS = frozenset({
    KEYS["norm_eps"], KEYS["rope_theta"], YARN_KEYS["factor"], YARN_KEYS["beta_fast"], YARN_KEYS["beta_slow"],
})  # fmt: skip
"""Keys whose values are fp32 even where they are whole."""


class _Tensor(NamedTuple):
    """A tensor of the file: its name, its shape, the type of its numbers, the parts that its rows come from, and
    whether their order is that of llama.cpp."""

    name: str
    shape: tuple[int, ...]
    kind: str
    parts: list[Stored]
    paired: bool


def write_gguf(exported: Exported, folder: Path, name: str, dtype: str | None, progress: Progress) -> None:
    """Write FOLDER/NAME-TYPE.gguf, the model card and the licence files. `dtype`: f32, f16, bf16 or q8_0 for the
    matrices; by default each keeps its precision. Vectors and routers are fp32, as llama.cpp wants them. Raises
    UsageError for what such a file cannot say."""
    require("gguf", "gguf")
    import gguf

    checkpoint, config = exported.checkpoint, exported.checkpoint.config
    architecture = FAMILIES[exported.config.model_type].gguf
    _check(checkpoint.source, config)
    found = _tensors_of(checkpoint, architecture, dtype and dtype.upper())
    matrices = next(one.kind for one in found if one.name == "token_embd.weight")
    names = checkpoint.kept["tokenizer_config"] | _template(checkpoint.source)
    fields = gguf_fields(checkpoint.fast(), names, config.vocab_size, checkpoint.source)

    writer = gguf.GGUFWriter(folder / f"{name}-{matrices}.gguf", architecture)
    _add_general(writer, checkpoint, name, matrices)
    _add_sizes(writer, architecture, config)
    for key, value in fields.items():
        _add(writer, key, value)
    if exported.end_id is not None:
        writer.add_eot_token_id(exported.end_id)
    if template := names.get("chat_template"):
        writer.add_chat_template(template)
    if (scaling := config.rotary_scaling or {}).get("rope_type") == "llama3":
        factors = llama3_factors(config.head_dim, config.rope_theta, scaling).numpy()
        writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for one in found:
        kind = gguf.GGMLQuantizationType[one.kind]
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), _bytes(one), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (out,) = writer.fout
    writer.write_padding(out, out.tell())
    if scaling.get("rope_type") == "llama3":
        factors.tofile(out)
        writer.write_padding(out, factors.nbytes)
    total, done = sum(map(_bytes, found)), 0
    for one in found:
        for data in _data(one, config.head_dim):
            data.tofile(out)
            done += data.nbytes
            progress(done // 10**6, total // 10**6)
        writer.write_padding(out, _bytes(one))
    writer.close()
    write_papers(checkpoint, folder, "gguf")


def _check(source: Path, config: ModelConfig) -> None:
    """Raise UsageError for a network that its family has, and a GGUF file cannot describe."""
    if config.num_experts and (config.expert_interval, config.dense_layers, config.normalize_expert_weights) != (
        1,
        0,
        True,
    ):
        raise UsageError(
            f"{source} cannot be a GGUF file: there all layers have experts, whose weights sum to one "
            "(model.expert_interval 1, dense_layers 0, normalize_expert_weights true)."
        )
    scaling = config.rotary_scaling or {}
    more = scaling.keys() - {"rope_type", *YARN_KEYS} if scaling.get("rope_type") == "yarn" else ()
    if more:
        raise UsageError(f"{source} cannot be a GGUF file, which has no key for model.rotary_scaling.{min(more)}.")


def _tensors_of(checkpoint: Checkpoint, architecture: str, kind: str | None) -> list[_Tensor]:
    place = placing(architecture)
    found: dict[str, _Tensor] = {}
    for joined in tensors(checkpoint.config):
        for part in joined.parts:
            name, expert, paired = place(part)
            stored = checkpoint.find(part)
            if name in found:
                found[name].parts.append(stored)
                continue
            shape = part.shape if expert is None else (checkpoint.config.num_experts, *part.shape)
            plain = len(part.shape) == 1 or name.endswith(_ROUTER)
            chosen = "F32" if plain else kind or _PLAIN[stored.dtype]
            if chosen == "Q8_0" and shape[-1] % 32:
                raise UsageError(
                    f"{checkpoint.source}: the rows of {part.name} have {shape[-1]} numbers; q8_0 takes a multiple "
                    "of 32."
                )
            found[name] = _Tensor(name, shape, chosen, [stored], paired)
    return list(found.values())


def _bytes(one: _Tensor) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[one.kind]]
    return math.prod(one.shape) // block * size


def _data(one: _Tensor, width: int) -> Iterator[np.ndarray]:
    for part in one.parts:
        for values in part.chunks(width if one.paired else 1):
            yield _encoded(_paired(values, width) if one.paired else values, one)


def _paired(values: Tensor, width: int) -> Tensor:
    """The rows of whole heads in the order of llama.cpp (gguf_file._unpaired goes back)."""
    return values.view(-1, 2, width // 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _encoded(values: Tensor, one: _Tensor) -> np.ndarray:
    import gguf

    if one.kind == "Q8_0":
        made: np.ndarray = gguf.quantize(values.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        return made
    dtype = next(dtype for dtype, kind in _PLAIN.items() if kind == one.kind)
    made = cast(values, dtype, one.name).contiguous().view(-1).view(torch.uint8).numpy()
    return made


def _add_general(writer: Any, checkpoint: Checkpoint, name: str, kind: str) -> None:
    import gguf

    origin = checkpoint.origin
    writer.add_type("model")
    writer.add_name(name)
    writer.add_license(origin.get("license", ""))
    writer.add_license_name(origin.get("license_name", ""))
    writer.add_license_link(origin.get("license_link", ""))
    if base := origin.get("name"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        if "/" in base:
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_sizes(writer: Any, architecture: str, config: ModelConfig) -> None:
    values: dict[str, Any] = {
        key: getattr(config, ours) for ours, key in KEYS.items() if config.num_experts or ours not in EXPERT_KEYS
    }
    values |= {"attention.value_length": config.head_dim, "vocab_size": config.vocab_size}
    values["rope.dimension_count"] = config.head_dim
    if (scaling := config.rotary_scaling or {}).get("rope_type") == "yarn":
        values["rope.scaling.type"] = "yarn"
        values |= {key: scaling[ours] for ours, key in YARN_KEYS.items() if ours in scaling}
    for key, value in values.items():
        _add(writer, f"{architecture}.{key}", float(value) if key in _FLOATS else value)


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _template(source: Path) -> dict[str, str]:
    file = source / TEMPLATE
    return {"chat_template": file.read_text("utf-8")} if file.is_file() else {}

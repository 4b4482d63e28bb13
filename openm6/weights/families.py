"""Families of open text checkpoints: which configurations, and which tensors, stand for an M6.

The blocks are the same mathematics (RMSNorm, grouped-query attention, rotary positions by halves, SwiGLU, top-k
experts); what differs are names, and that M6 keeps queries, keys and values, gate and up, and the experts of a layer in
one tensor each. The tables are read in both directions: an import goes from their keys and tensors to ours, an export
back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from openm6.core.errors import UsageError
from openm6.model.config import ModelConfig

KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads", "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
"""Keys of ModelConfig, and those of transformers' configurations with the same values."""
EXPERT_KEYS = {
    "num_experts": "num_experts", "experts_per_token": "num_experts_per_tok",
    "expert_intermediate_size": "moe_intermediate_size", "expert_interval": "decoder_sparse_step",
    "normalize_expert_weights": "norm_topk_prob",
}  # fmt: skip
"""Likewise of a family with experts; `dense_layers` n is `mlp_only_layers` [0, ..., n - 1]."""


_ELSEWHERE = frozenset({
    "num_codes", "image_embedder", "image_patch", "image_max_patches", "stem_widths", "resnet", "picture_side",
    "picture_tile", "heads", "distinct_layers", "capacity_factor", "auxiliary_loss", "router_z_loss",
})  # fmt: skip
"""Keys of ModelConfig that the answers of a text network do not depend on."""
_EXPERTS_ALONE = {*EXPERT_KEYS, "dense_layers", "router", "shared_intermediate_size", "bias_update"} - {"num_experts"}
"""Keys that mean nothing without experts."""


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    architecture   its class for causal language modelling
    gguf           `general.architecture` of its GGUF files
    fixed          values of ModelConfig that all its checkpoints have
    required       keys of its configuration with the only values that an M6 expresses
    has_experts    whether EXPERT_KEYS are among its keys
    """

    architecture: str
    gguf: str
    fixed: Mapping[str, Any]
    required: Mapping[str, Any]
    has_experts: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", {}, {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family("MistralForCausalLM", "llama", {}, {"sliding_window": None}),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", {"qkv_bias": True}, {"use_sliding_window": False}),
    "qwen3": Family(
        "Qwen3ForCausalLM", "qwen3", {"qk_norm": True}, {"use_sliding_window": False, "attention_bias": False}
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "qwen3moe", {"qk_norm": True},
        {"use_sliding_window": False, "attention_bias": False}, has_experts=True,
    ),
}  # fmt: skip


class Part(NamedTuple):
    """A tensor of transformers: its name and shape."""

    name: str
    shape: tuple[int, ...]


class Joined(NamedTuple):
    """A tensor of M6, and theirs that stand in it one below the other, row by row."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def tensors(config: ModelConfig) -> Iterator[Joined]:
    """Every tensor of a network but those of image encoder and task heads, with theirs."""
    d, f, v, e = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, k = config.num_attention_heads * e, config.num_key_value_heads * e
    n, w, sparse = config.num_experts, config.expert_intermediate_size, set(config.expert_layers())

    def one(name: str, theirs: str, *shape: int) -> Joined:
        return Joined(name, shape, (Part(theirs, shape),))

    yield one("embed.weight", "model.embed_tokens.weight", v, d)
    for layer in range(config.num_hidden_layers):
        us, them = f"blocks.{layer}", f"model.layers.{layer}"
        qkv = [(f"{them}.self_attn.{name}_proj", rows) for name, rows in (("q", q), ("k", k), ("v", k))]
        yield one(f"{us}.attention_norm.weight", f"{them}.input_layernorm.weight", d)
        yield Joined(
            f"{us}.attention.qkv.weight", (q + 2 * k, d), tuple(Part(f"{name}.weight", (r, d)) for name, r in qkv)
        )
        if config.qkv_bias:
            yield Joined(f"{us}.attention.qkv.bias", (q + 2 * k,), tuple(Part(f"{name}.bias", (r,)) for name, r in qkv))
        yield one(f"{us}.attention.out.weight", f"{them}.self_attn.o_proj.weight", d, q)
        if config.qk_norm:
            yield one(f"{us}.attention.q_norm.weight", f"{them}.self_attn.q_norm.weight", e)
            yield one(f"{us}.attention.k_norm.weight", f"{them}.self_attn.k_norm.weight", e)
        yield one(f"{us}.feed_forward_norm.weight", f"{them}.post_attention_layernorm.weight", d)
        us, them = f"{us}.feed_forward", f"{them}.mlp"
        if layer not in sparse:
            both = tuple(Part(f"{them}.{name}_proj.weight", (f, d)) for name in ("gate", "up"))
            yield Joined(f"{us}.up.weight", (2 * f, d), both)
            yield one(f"{us}.down.weight", f"{them}.down_proj.weight", d, f)
            continue
        yield one(f"{us}.router.weight", f"{them}.gate.weight", n, d)
        experts = [f"{them}.experts.{expert}" for expert in range(n)]
        ups = tuple(Part(f"{one}.{name}_proj.weight", (w, d)) for one in experts for name in ("gate", "up"))
        yield Joined(f"{us}.experts.up", (n, 2 * w, d), ups)
        downs = tuple(Part(f"{one}.down_proj.weight", (d, w)) for one in experts)
        yield Joined(f"{us}.experts.down", (n, d, w), downs)
    yield one("norm.weight", "model.norm.weight", d)
    if not config.tie_word_embeddings:
        yield one("head.weight", "lm_head.weight", v, d)


def model_config(theirs: Mapping[str, Any], file: Path) -> ModelConfig:
    """The ModelConfig of a config.json. Raises UsageError, with the key and its value, for one that is not expressed.

    Keys that it leaves out have the defaults of transformers' class."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UsageError(f"{file}: model_type is {_json(kind)}; what can be imported: {', '.join(FAMILIES)}.")
    family = FAMILIES[kind]
    if theirs.get("quantization_config"):
        raise UsageError(
            f"{file}: quantization_config is {_json(theirs['quantization_config'])}; a quantized checkpoint can be "
            "imported as a GGUF file: take the original checkpoint, or one."
        )
    found = _standard(kind, theirs, file)
    for key, value in {"hidden_act": "silu", **family.required}.items():
        if (given := getattr(found, key)) != value:
            raise UsageError(f"{file}: {key} is {_json(given)}; only {_json(value)} can be imported.")
    keys = KEYS | (EXPERT_KEYS if family.has_experts else {})
    values = {ours: getattr(found, key) for ours, key in keys.items() if getattr(found, key, None) is not None}
    for ours, value in values.items():
        if (type(value) is int or ours == "norm_eps") and not 0 < value < 2**31:
            raise UsageError(f"{file}: {keys[ours]} is {value}; it has to be a number above 0.")
    if family.has_experts:
        values["dense_layers"] = _dense_layers(found.mlp_only_layers, file)
    return checked_config({**family.fixed, **values, **_rotary(found, file)}, file)


def their_config(config: ModelConfig, kept: Mapping[str, Any], source: Path) -> Any:
    """transformers' configuration of a text network: of the family that `kept` (see `kept_keys`) is of, or of the first
    one that expresses it. Raises UsageError, with what does not fit, where none does."""
    first = kept.get("model_type")
    misfits = {}
    for kind in sorted(FAMILIES, key=lambda kind: kind != first):
        if not (misfit := _misfits(config, kind)):
            own = kept if kind == first else {key: kept[key] for key in kept if key.endswith("_token_id")}
            found = _standard(kind, {**own, **_their_keys(config, kind)}, source)
            found.architectures = [FAMILIES[kind].architecture]
            return found
        misfits[kind] = misfit
    sparse = bool(config.num_experts)
    nearest = min(misfits, key=lambda kind: (FAMILIES[kind].has_experts != sparse, len(misfits[kind])))
    raise UsageError(
        f"{source} is like no family of Hugging Face's ({', '.join(FAMILIES)}); the nearest is {nearest}, but "
        f"{'; '.join(misfits[nearest])}."
    )


def kept_keys(theirs: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The keys of a config.json that ModelConfig has not, as far as transformers' class knows them: its family, the ids
    of special tokens, settings of training. An export writes them again."""
    found = _standard(theirs["model_type"], theirs, file)
    expressed = {*_their_keys(model_config(theirs, file), found.model_type), "architectures", "dtype", "layer_types",
        "transformers_version"}  # fmt: skip
    own = {"head_dim", *(field.name for field in fields(found))} - expressed
    values = {key: value for key, value in found.to_diff_dict().items() if key in own}
    return {"model_type": found.model_type, **values}


def _their_keys(config: ModelConfig, kind: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    family = FAMILIES[kind]
    keys = KEYS | (EXPERT_KEYS if family.has_experts else {})
    values = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    known = {field.name for field in fields(CONFIG_MAPPING[kind])}
    if "head_dim" not in known and config.head_dim * config.num_attention_heads == config.hidden_size:
        del values["head_dim"]
    if family.has_experts:
        values["mlp_only_layers"] = list(range(config.dense_layers))
    rope = {"rope_type": "default", **(config.rotary_scaling or {}), "rope_theta": config.rope_theta}
    return {"model_type": kind, "hidden_act": "silu", **family.required, **values, "rope_parameters": rope}


def _misfits(config: ModelConfig, kind: str) -> list[str]:
    """What keeps a network from being one of the family: what an import of its configuration would change."""
    try:
        back = model_config(_their_keys(config, kind), Path("config.json"))
    except UsageError as error:
        return [str(error).rstrip(".")]
    names = {field.name for field in fields(ModelConfig)} - _ELSEWHERE
    if not (config.num_experts and back.num_experts):
        names -= _EXPERTS_ALONE
    pairs = [(name, getattr(config, name), getattr(back, name)) for name in sorted(names)]
    return [f"model.{n} is {_json(ours)}, not {_json(theirs)}" for n, ours, theirs in pairs if ours != theirs]


def checked_config(values: Mapping[str, Any], file: Path) -> ModelConfig:
    """A ModelConfig without image encoder, with a causal source, as such checkpoints were trained. Raises UsageError,
    with the file, for values that do not fit."""
    try:
        return ModelConfig(image_embedder="none", source="causal", **values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def _standard(kind: str, theirs: Mapping[str, Any], file: Path) -> Any:
    """The configuration as transformers reads it: with the defaults of its class, and one form of rotary positions."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(theirs))
    except Exception as error:  # anything in a file from outside can be of a wrong type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{file} is not the configuration of a {kind} model: {reason[-1].strip()}") from None


def _rotary(found: Any, file: Path) -> dict[str, Any]:
    given = {key: value for key, value in found.rope_parameters.items() if value is not None and key != "type"}
    theta, kind = given.pop("rope_theta", None), given.get("rope_type", "default")
    if type(theta) not in (int, float) or not theta > 1:
        raise UsageError(f"{file}: rope_theta is {_json(theta)}; it has to be a number above 1.")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{file}: partial_rotary_factor is not 1; only whole heads that turn can be imported.")
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind == "yarn" and "factor" not in given:
        given["factor"] = found.max_position_embeddings / given["original_max_position_embeddings"]
    if kind not in ("llama3", "yarn"):
        raise UsageError(f"{file}: rope_type is {_json(kind)}; only default, llama3 and yarn can be imported.")
    return {"rope_theta": float(theta), "rotary_scaling": given}


def _dense_layers(mlp_only: list[int], file: Path) -> int:
    dense = sorted(mlp_only)
    if dense != list(range(len(dense))):
        raise UsageError(f"{file}: mlp_only_layers is {dense}; only the first layers can be dense among experts.")
    return len(dense)


def _json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."

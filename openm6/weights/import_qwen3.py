"""Start from what exists: a Qwen3 or Qwen3-MoE text checkpoint becomes an M6 backbone.

The block is the same mathematics (RMSNorm, grouped-query attention with per-head norms, rotary positions by
halves, SwiGLU, top-k experts); only names differ, and M6 keeps queries, keys and values, and gate and up, in one
matrix each, and the experts of a layer in one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openm6.core.errors import OpenM6Error, UsageError
from openm6.model.config import ModelConfig
from openm6.model.files import open_tensors
from openm6.model.m6 import M6

_FAMILIES = ("qwen3", "qwen3_moe")


def read_config(path: Path, **changes: Any) -> ModelConfig:
    """The ModelConfig of a Qwen3 checkpoint directory; `changes` choose the image embedder and the vocabulary."""
    try:
        theirs = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} has no config.json: give the directory of a Hugging Face checkpoint.") from None
    except ValueError:
        raise OpenM6Error(f"{path / 'config.json'} is not valid JSON.") from None
    family = theirs.get("model_type")
    if family not in _FAMILIES:
        raise UsageError(f'{path} holds a "{family}" model; what can be imported: {", ".join(_FAMILIES)}.')
    if theirs.get("use_sliding_window") or theirs.get("attention_bias") or theirs.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{path} uses sliding windows, attention biases or another activation; that is not imported.")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UsageError(f"{path} scales its rotary positions ({rope.get('rope_type')}); that is not imported.")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    sizes = {key: theirs[key] for key in same if key in theirs}
    sizes |= {
        "rope_theta": float(theirs.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "qk_norm": True,
        "source": "causal",
    }
    if family == "qwen3_moe":
        sizes |= _expert_sizes(path, theirs)
    return ModelConfig(**{**sizes, **changes})


def _expert_sizes(path: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    dense = sorted(theirs.get("mlp_only_layers") or ())
    if dense != list(range(len(dense))):
        raise UsageError(f"{path} has dense layers {dense} among its experts; only the first ones can be dense.")
    return {
        "num_experts": theirs.get("num_experts", theirs.get("num_local_experts", 0)),
        "experts_per_token": theirs["num_experts_per_tok"],
        "expert_intermediate_size": theirs["moe_intermediate_size"],
        "normalize_expert_weights": theirs.get("norm_topk_prob", False),
        "expert_interval": theirs.get("decoder_sparse_step", 1),
        "dense_layers": len(dense),
    }


def import_qwen3(path: str | Path, vocab_size: int | None = None, **changes: Any) -> M6:
    """An M6 with the weights of a Qwen3 or Qwen3-MoE directory (config.json, safetensors in one file or in shards).

    `vocab_size` appends rows for new tokens to the embedding (and head): the old rows stay as they are, the
    new ones start at the mean of the old ones plus noise, so that they are neither likely nor out of scale.
    `changes` are values of ModelConfig, e.g. `image_embedder="stem"`; the image embedder starts at random.
    """
    path = Path(path)
    config = read_config(path, **changes)
    old_size = config.vocab_size
    if vocab_size is not None:
        if vocab_size < old_size:
            raise UsageError(f"vocab_size {vocab_size} is smaller than the checkpoint's {old_size}.")
        config.vocab_size = vocab_size
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"{path} has no safetensors files (pickled checkpoints are not read).")
    model = M6(config)
    with open_tensors(path) as where:

        def read(*names: str) -> Tensor:
            """The checkpoint's tensors of these names, concatenated by rows, fp32."""
            if absent := [name for name in names if name not in where]:
                raise OpenM6Error(f"{path} has no tensor {absent[0]}.")
            return torch.cat([where[name].get_tensor(name).float() for name in names])

        ours: dict[str, Tensor] = {}
        for index in range(config.num_hidden_layers):
            ours |= {name: read(*sources) for name, sources in _block_names(index).items()}
            us, them = f"blocks.{index}.feed_forward", f"model.layers.{index}.mlp"
            if index not in config.expert_layers():
                ours[f"{us}.up.weight"], ours[f"{us}.down.weight"] = _feed_forward(read, them)
                continue
            pairs = [_feed_forward(read, f"{them}.experts.{n}") for n in range(config.num_experts)]
            ours[f"{us}.experts.up"], ours[f"{us}.experts.down"] = map(torch.stack, zip(*pairs, strict=True))
            ours[f"{us}.router.weight"] = read(f"{them}.gate.weight")
        ours["norm.weight"] = read("model.norm.weight")
        ours["embed.weight"] = _grown(read("model.embed_tokens.weight"), config.vocab_size)
        if not config.tie_word_embeddings:
            ours["head.weight"] = _grown(read("lm_head.weight"), config.vocab_size)
    image = {} if model.image is None else model.image.state_dict(prefix="image.")
    missing = sorted(model.state_dict().keys() - image.keys() - ours.keys())
    if missing:
        raise OpenM6Error(f"{path} gives no weights for {missing[0]}.")
    try:
        model.load_state_dict(ours, strict=False)
    except RuntimeError as error:
        raise OpenM6Error(f"{path}: weights and config.json do not fit: {str(error).splitlines()[1].strip()}") from None
    return model


def _block_names(layer: int) -> Mapping[str, tuple[str, ...]]:
    """Our name of every tensor of a block but its feed-forward, and theirs, to be put one below the other."""
    us, them = f"blocks.{layer}", f"model.layers.{layer}"
    return {
        f"{us}.attention_norm.weight": (f"{them}.input_layernorm.weight",),
        f"{us}.attention.qkv.weight": tuple(f"{them}.self_attn.{x}_proj.weight" for x in "qkv"),
        f"{us}.attention.out.weight": (f"{them}.self_attn.o_proj.weight",),
        f"{us}.attention.q_norm.weight": (f"{them}.self_attn.q_norm.weight",),
        f"{us}.attention.k_norm.weight": (f"{them}.self_attn.k_norm.weight",),
        f"{us}.feed_forward_norm.weight": (f"{them}.post_attention_layernorm.weight",),
    }


def _feed_forward(read: Callable[..., Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Our up (gate above up) and down of a feed-forward or expert of theirs."""
    return read(f"{name}.gate_proj.weight", f"{name}.up_proj.weight"), read(f"{name}.down_proj.weight")


def _grown(weight: Tensor, rows: int) -> Tensor:
    extra = rows - len(weight)
    if not extra:
        return weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(extra, weight.shape[1], generator=generator) * weight.float().std() * 0.1
    return torch.cat([weight, (weight.float().mean(0) + noise).to(weight.dtype)])

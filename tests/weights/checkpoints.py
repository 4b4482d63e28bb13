"""Random checkpoints of every family, by transformers' own classes, and GGUF files of them, as llama.cpp's converter
writes them (convert_hf_to_gguf.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from openm6.compress.convert import import_model
from openm6.core.batch import pad
from openm6.core.sequence import CAUSAL, IGNORE, Sequence
from openm6.model.files import load_model

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}

ODDITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-one-key": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16}),
    "qwen3_moe-interval": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen3_moe-dense": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0], "num_experts_per_tok": 1}),
}
"""A family and values of its configuration."""


def network(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms, and biases, which begin at 0
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert "." in name
    return model


def save(model: nn.Module, path: Path, **options: Any) -> Path:
    """A directory of the model and a tokenizer."""
    model.save_pretrained(path, **options)
    foreign_tokenizer().save(str(path / "tokenizer.json"))
    return path


def foreign_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level vocabulary like SmolLM's, with two special tokens, smaller than the models'."""
    return tokenizers.Tokenizer.from_str(_trained())


@cache
def _trained() -> str:
    fast = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator(["the cat sat on the mat, the dog sat on the log"] * 3, trainer)
    fast.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return str(fast.to_str())


def imported(source: Path, **options: Any) -> nn.Module:
    """The M6 of a checkpoint, by way of its model directory."""
    output = source.with_name(f"{source.name}-m6")
    import_model(source, output, "none", options.pop("num_codes", 0), 64, **options)
    return load_model(output).eval()


def logits(ours: nn.Module, ids: np.ndarray) -> Tensor:
    """Of a text without a source, fp32 [T, V]."""
    n = len(ids)
    text = Sequence(ids.astype(np.int32), np.full(n, CAUSAL, np.int32), np.full(n, IGNORE, np.int32))
    with torch.no_grad():
        return ours.logits(ours(pad([text], 0)).hidden)[0]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal logits on a text that is longer than the original length of a scaled model."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 80)
    theirs = theirs if theirs.dtype == torch.float32 else theirs.float()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours, ids)[:, :VOCABULARY], expected, atol=1e-4, rtol=1e-4)


# GGUF

Change = Callable[[gguf.GGUFWriter], None]


def write_gguf(
    model: nn.Module, file: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Change = lambda writer: None, **more: np.ndarray,
) -> Path:  # fmt: skip
    """A file with the model's matrices in this form, and what is not a matrix in fp32. The model gets the numbers that
    the file has. `more`: further tensors."""
    config = model.config
    name = {"mistral": "llama", "qwen3_moe": "qwen3moe"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, name)
    writer.add_name("A model")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if name == "llama":
        writer.add_rope_dimension_count(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        more["rope_freqs.weight"] = _llama3_divisors(width, rope)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _add_tokenizer(writer, config.vocab_size)
    change(writer)
    for tensor, values in _renamed(model, name, kind).items():
        writer.add_tensor(tensor, values, raw_dtype=kind if values.ndim > 1 else None)
    for tensor, values in more.items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _llama3_divisors(width: int, rope: dict[str, Any]) -> np.ndarray:
    found = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        original, low, high = (
            rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    fast = foreign_tokenizer()
    names = {number: token for token, number in fast.get_vocab(with_added_tokens=True).items()}
    added = fast.get_added_tokens_decoder()
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([
        (kinds.CONTROL if added[n].special else kinds.USER_DEFINED) if n in added
        else kinds.NORMAL if n in names else kinds.UNUSED for n in range(size)
    ])  # fmt: skip
    import json

    writer.add_token_merges([" ".join(merge) for merge in json.loads(fast.to_str())["model"]["merges"]])


def _renamed(model: nn.Module, name: str, kind: gguf.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """The tensors of a file; quantized numbers are put back into the model."""
    number = next(key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for key, value in _per_expert(model):
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        data = value.detach().numpy()
        if data.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quantize(data, kind)
            value.data.copy_(torch.from_numpy(gguf.dequantize(data, kind)))
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = model.config.num_attention_heads if "q_proj" in key else model.config.num_key_value_heads
            data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        *before, last = key.split(".")
        if before[-3:-2] == ["experts"]:
            before.pop(-2)
            experts.setdefault(f"{names.get_name('.'.join(before))}.{last}", []).append(data)
        else:
            found[f"{names.get_name('.'.join(before))}.{last}"] = data
    return found | {key: np.stack(every) for key, every in experts.items()}


def _per_expert(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors as files have them: transformers keeps the experts of a layer in one tensor."""
    found = []
    for key, value in model.state_dict().items():
        if key.endswith("experts.gate_up_proj"):
            for number, both in enumerate(value):
                one = key.replace("gate_up_proj", str(number))
                found += zip((f"{one}.gate_proj.weight", f"{one}.up_proj.weight"), both.chunk(2), strict=True)
        elif key.endswith("experts.down_proj"):
            found += [(f"{key.replace('down_proj', str(n))}.down_proj.weight", down) for n, down in enumerate(value)]
        else:
            found.append((key, value))
    return found

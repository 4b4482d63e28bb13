"""GGUF files, against transformers' classes with the same weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind, GGUFWriter
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from openm6.compress.convert import import_model
from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.weights.import_checkpoint import open_checkpoint
from tests.weights.checkpoints import ODDITIES, assert_same, foreign_tokenizer, imported, network, write_gguf

IN_GGUF = [name for name in ODDITIES if name not in ("qwen3_moe-interval", "qwen3_moe-dense", "qwen3-yarn")]
"""What the format can say: of experts in all layers, with weights that sum to one."""


@pytest.mark.parametrize("oddity", IN_GGUF)
def test_logits_equal_transformers(oddity: str, tmp_path: Path) -> None:
    family, changes = ODDITIES[oddity]
    theirs = network(family, **changes)
    assert_same(imported(write_gguf(theirs, tmp_path / "model.gguf")), theirs)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_numbers_in_few_bits_are_those_of_the_file(kind: Kind, family: str, tmp_path: Path) -> None:
    theirs = network(family, **ODDITIES[family][1])
    file = write_gguf(theirs, tmp_path / "model.gguf", kind)
    assert_same(imported(file), theirs)
    stored = load_file(tmp_path / "model.gguf-m6" / "model.safetensors")
    expected = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert stored["blocks.0.attention.qkv.weight"].dtype == expected
    assert stored["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_blocks_of_256_numbers(kind: Kind, tmp_path: Path) -> None:
    """The package writes none, so their bytes are random, with scales that are numbers."""
    theirs = network("llama", hidden_size=256, intermediate_size=256)
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    down = theirs.model.layers[0].mlp.down_proj.weight
    data = rng.integers(0, 256, (256, size), np.uint8)
    place = 0 if kind == Kind.Q4_K else size - 2
    for at in (place, place + 2) if kind == Kind.Q4_K else (place,):
        data[:, at : at + 2] = np.full(256, 0.001, np.float16).view(np.uint8).reshape(256, 2)
    down.data.copy_(torch.from_numpy(gguf.dequantize(data, kind)))
    file = write_gguf(theirs, tmp_path / "plain.gguf")
    checkpoint = open_checkpoint(write_gguf(theirs, tmp_path / "other.gguf"))
    assert checkpoint.config == open_checkpoint(file).config
    add, renamed = GGUFWriter.add_tensor, "blk.0.ffn_down.weight"

    def swap(writer: GGUFWriter) -> None:
        def add_tensor(name: str, values: np.ndarray, raw_dtype: Kind | None = None) -> None:
            add(writer, name, *((data, None, kind) if name == renamed else (values, None, raw_dtype)))

        writer.add_tensor = add_tensor

    assert_same(imported(write_gguf(theirs, tmp_path / "model.gguf", change=swap)), theirs)


def test_a_file_gives_tokenizer_name_and_licence(tmp_path: Path) -> None:
    file = write_gguf(network("llama", tie_word_embeddings=True), tmp_path / "model.gguf")
    import_model(file, tmp_path / "m6", "none", 16, 64)
    processor = Session.load(tmp_path / "m6", trainable=True).processor
    for text in ("the cat sat 123  on\nthe mat", "<|im_end|>", "a <think> b", "日本語 ü"):
        fast = foreign_tokenizer()
        fast.encode_special_tokens = True
        assert processor.tokenizer.encode(text) == fast.encode(text, add_special_tokens=False).ids
        assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text
    assert processor.origin == {"name": "A model", "license": "apache-2.0"}


def test_divisors_of_other_scalings_are_refused(tmp_path: Path) -> None:
    model, width = network("llama", head_dim=32), 32
    for found in (np.full(width // 2, 2.0, np.float32), np.ones(3, np.float32)):
        file = write_gguf(model, tmp_path / "model.gguf", **{"rope_freqs.weight": found})
        with pytest.raises(UsageError, match="divisors in rope_freqs.weight are not those of Llama 3.1"):
            open_checkpoint(file)


KEYS: list[tuple[str, Any, str]] = [
    ("llama.rope.scaling.type", "linear", "rope.scaling.type is 'linear'; only none and yarn can be imported"),
    ("llama.rope.scaling.attn_factor", 2.0, "rope.scaling.attn_factor is 2.0; only 1.0 can be imported"),
    ("llama.rope.dimension_count", 8, "rope.dimension_count is 8; only 16 can be imported"),
    ("llama.attention.sliding_window", 4096, "attention.sliding_window is 4096; only 0"),
    ("llama.attention.key_length", 8, "q.weight has the shape .*; by its configuration it is|dimension_count is 16"),
    ("llama.attention.head_count", [4, 4], r"head_count is \[4, 4\]; it has to be one number above 0"),
    ("llama.block_count", 0, "block_count is 0; it has to be one number above 0"),
    ("llama.block_count", 2**31 - 1, "has no tensor blk.2"),
    ("llama.expert_count", 8, "expert_count is 8; this key cannot be imported"),
    ("llama.logit_scale", 2.0, "logit_scale is 2.0; this key cannot be imported"),
    ("llama.rope.freq_base", 1.0, "rope.freq_base is 1.0; it has to be one number above 1"),
    ("llama.logit_scale", "x" * 10**6, "logit_scale is 'xxx.{0,300}; this key cannot be imported"),
    ("general.architecture", ["llama"], "general.architecture is .*; what can be imported: llama, qwen2"),
    ("general.architecture", "gemma3", "general.architecture is 'gemma3'; what can be imported: llama, qwen2"),
    ("general.type", "adapter", "general.type is 'adapter'; only a model can be imported"),
    ("split.count", 3, "split.count is 3; merge its files first"),
]


@pytest.mark.parametrize(("key", "value", "reason"), KEYS)
def test_what_cannot_be_imported_is_refused_by_its_key(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        kind = gguf.GGUFValueType.get_type(value)
        kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    file = write_gguf(network("llama"), tmp_path / "model.gguf", change=change)
    with pytest.raises(OpenM6Error, match=reason):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tokenizer.ggml.pre", "gpt-9", "tokenizer.ggml.pre is 'gpt-9'; what can be imported: qwen2"),
        ("tokenizer.ggml.model", "rwkv", "tokenizer.ggml.model is 'rwkv'; what can be imported: gpt2, llama"),
        ("tokenizer.ggml.tokens", ["a", "a"], "tokenizer.ggml.tokens are missing, repeat"),
        ("tokenizer.ggml.merges", ["a b c"], "its tokenizer is damaged"),
    ],
)
def test_tokenizers_that_cannot_be_imported_are_refused(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop(key)
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    file = write_gguf(network("llama"), tmp_path / "model.gguf", change=change)
    with pytest.raises(OpenM6Error, match=reason):
        import_model(file, tmp_path / "m6", "none", 0, 64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(network("llama"), tmp_path_factory.mktemp("gguf") / "model.gguf")


def changed(whole: Path, folder: Path, place: int, form: str, value: int) -> Path:
    data = bytearray(whole.read_bytes())
    struct.pack_into(form, data, place, value)
    (folder / "changed.gguf").write_bytes(data)
    return folder / "changed.gguf"


LIES = {
    "version": (4, "<I", 7, "has the version 7 of GGUF"),
    "tensors": (8, "<Q", 2**60, "its header has 1152921504606846976 items of 24 bytes or more"),
    "pairs": (16, "<Q", 2**40, "items of 12 bytes or more"),
    "length of the first key": (24, "<Q", 2**62, "items of 1 bytes or more, and"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_sentence(lie: str, whole: Path, tmp_path: Path) -> None:
    place, form, value, reason = LIES[lie]
    with pytest.raises(OpenM6Error, match=reason):
        open_checkpoint(changed(whole, tmp_path, place, form, value))


@pytest.mark.parametrize("name", ["tokens", "blk.0.attn_q.weight"])
def test_arrays_and_tensors_that_end_behind_the_file_are_refused(name: str, whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    if name == "tokens":
        place = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8  # type, type of the elements
        file, reason = changed(whole, tmp_path, place, "<Q", 2**40), "items of 8 bytes or more"
    else:
        place = data.index(name.encode()) + len(name) + 4 + 16 + 4  # dimensions and their number, type
        file, reason = (
            changed(whole, tmp_path, place, "<Q", 2**50),
            f"the tensor {name} ends behind the end of the file",
        )
    with pytest.raises(OpenM6Error, match=reason):
        open_checkpoint(file)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_but_an_error_of_one_sentence(whole: Path, data: st.DataObject) -> None:
    """Whatever stands in the header: the file is refused, or (where its tokens, say, are others) it is read."""
    content = bytearray(whole.read_bytes())
    end = content.index(b"blk.1.ffn_up.weight") + 60
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(4, end))
        content[place : place + 8] = data.draw(st.binary(min_size=1, max_size=8))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(4, len(content))) :]
    file = whole.with_name("damaged.gguf")
    file.write_bytes(content)
    try:
        open_checkpoint(file).fast()
    except OpenM6Error as error:
        assert "\n" not in str(error)


def test_transformers_reads_the_files_of_these_tests(tmp_path: Path) -> None:
    """The writer above is llama.cpp's, as far as transformers can tell."""
    from transformers import AutoModelForCausalLM

    theirs = network("llama")
    file = write_gguf(theirs, tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict(), default=str))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    assert_same(imported(file), other)

"""GGUF files of model directories: read back, and read by the package gguf."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from openm6.compress.convert import export_model, import_model
from openm6.core.errors import UsageError
from openm6.model.files import load_model
from openm6.weights.gguf_file import FACTORS
from openm6.weights.gguf_tokenizer import gguf_fields, gguf_tokenizer
from tests.weights.checkpoints import ODDITIES, assert_same, network, save, write_gguf
from tests.weights.test_export_checkpoint import own_model, stored
from tests.weights.test_gguf_file import IN_GGUF
from tests.weights.test_gguf_tokenizer import TEXTS, trained

PRECISIONS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def exported(source: Path, dtype: str | None = None) -> Path:
    output = source.with_name(f"{source.name}-gguf")
    export_model(source, output, "gguf", dtype)
    (file,) = output.glob("*.gguf")
    return file


def contents(file: Path) -> tuple[dict[str, object], dict[str, tuple[tuple[int, ...], Kind, bytes]]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {one.name: (tuple(one.shape), one.tensor_type, one.data.tobytes()) for one in reader.tensors}
    return fields, tensors


@pytest.mark.parametrize("oddity", IN_GGUF)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_file_is_bit_equal_when_it_comes_back(oddity: str, dtype: str, tmp_path: Path) -> None:
    family, changes = ODDITIES[oddity]
    theirs = network(family, eos_token_id=1, **changes).to(PRECISIONS[dtype])
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    import_model(exported(tmp_path / "ours"), tmp_path / "back", "none", 0, 64)
    first, second = stored(tmp_path / "ours"), stored(tmp_path / "back")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        in_fp32 = tensor.ndim == 1 or "router" in name
        assert second[name].dtype == (torch.float32 if in_fp32 else PRECISIONS[dtype])
        rows = 320 if name in ("embed.weight", "head.weight") else len(tensor)  # new rows are drawn anew
        assert torch.equal(second[name][:rows], tensor[:rows].to(second[name].dtype)), name
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "back"))
    assert one == other | {"initializer_range": one["initializer_range"]}


@pytest.mark.parametrize("oddity", IN_GGUF)
def test_a_file_is_that_of_llama_cpps_converter(oddity: str, tmp_path: Path) -> None:
    family, changes = ODDITIES[oddity]
    theirs = network(family, eos_token_id=1, **changes)
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    fields, tensors = contents(exported(tmp_path / "ours", "bf16"))
    expected_fields, expected = contents(write_gguf(theirs, tmp_path / "expected.gguf", Kind.BF16))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        if name == FACTORS:
            factors = (np.frombuffer(one[name][2], np.float32) for one in (tensors, expected))
            np.testing.assert_allclose(*factors, rtol=1e-6)
        elif not name.endswith("ffn_gate_inp.weight"):  # a router is fp32
            assert tensor == expected[name], name
    own = {"general.name", "general.license"}  # of the checkpoint there
    for key, value in expected_fields.items():
        assert key in own or fields[key] == value, key


def test_numbers_are_rounded_as_the_package_rounds_them(tmp_path: Path) -> None:
    theirs = network("llama", **ODDITIES["llama3"][1])
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    file = exported(tmp_path / "ours", "q8_0")
    assert file.name == "ours-gguf-Q8_0.gguf"
    expected = write_gguf(theirs, tmp_path / "expected.gguf", Kind.Q8_0)
    one, other = contents(file)[1], contents(expected)[1]
    assert all(tensor == other[name] for name, tensor in one.items() if name != FACTORS)
    import_model(file, tmp_path / "back", "none", 0, 64)
    assert_same(load_model(tmp_path / "back").eval(), theirs)  # write_gguf has put its rounded numbers there


def test_chunks_have_whole_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_model(save(network("llama"), tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    whole = contents(exported(tmp_path / "ours"))[1]
    monkeypatch.setattr("openm6.weights.checkpoint.CHUNK", 1)
    export_model(tmp_path / "ours", tmp_path / "again", "gguf")
    assert contents(tmp_path / "again" / "again-F32.gguf")[1] == whole


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    for oddity, message in {
        "qwen3_moe-interval": "all layers have experts, whose weights sum to one",
        "qwen3_moe-dense": "all layers have experts",
        "qwen3-yarn": "no key for model.rotary_scaling.attention_factor",
    }.items():
        family, changes = ODDITIES[oddity]
        import_model(save(network(family, **changes), tmp_path / oddity), tmp_path / f"{oddity}-m6", "none", 0, 64)
        with pytest.raises(UsageError, match=message):
            export_model(tmp_path / f"{oddity}-m6", tmp_path / "out", "gguf")
    own_model(tmp_path / "own")
    with pytest.raises(UsageError, match="GGUF has no name for how its tokenizer cuts texts"):
        export_model(tmp_path / "own", tmp_path / "out", "gguf")
    own_model(tmp_path / "odd", intermediate_size=40)
    with pytest.raises(UsageError, match="down_proj.weight have 40 numbers; q8_0 takes a multiple of 32"):
        export_model(tmp_path / "odd", tmp_path / "out", "gguf", "q8_0")


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "smollm"])
def test_metadata_of_a_tokenizer_name_how_it_cuts_texts(name: str) -> None:
    fast = trained(name)
    size = fast.get_vocab_size() + 3
    fields = gguf_fields(fast, {"eos_token": {"content": "<|end|>"}}, size, Path("model"))
    assert fields["tokenizer.ggml.pre"] == name and fields["tokenizer.ggml.token_type"][-4:] == [4, 5, 5, 5]
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]] == "<|end|>"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    for text in TEXTS:
        assert gguf_tokenizer(fields, Path("model")).encode(text).ids == fast.encode(text).ids


def test_metadata_of_a_sentencepiece_vocabulary() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "d"]
    given = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-1.0 * number for number in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    fast = gguf_tokenizer(given, Path("model"))
    found = gguf_fields(fast, {"bos_token": "<s>", "unk_token": "<unk>"}, len(pieces + words), Path("model"))
    for key in ("model", "tokens", "token_type", "bos_token_id", "add_bos_token"):
        assert found[f"tokenizer.ggml.{key}"] == given[f"tokenizer.ggml.{key}"], key
    back = gguf_tokenizer(found, Path("model"))
    for text in ("abc", "ab d abc", "é abcabc"):
        assert back.encode(text).ids == fast.encode(text).ids
    assert fast.encode("abc").ids[0] == 1


def test_a_licence_and_a_template_stand_in_the_file(tmp_path: Path) -> None:
    path = save(network("llama"), tmp_path / "Llama")
    (path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n")
    (path / "LICENSE").write_text("LLAMA 3 COMMUNITY LICENSE AGREEMENT")
    import_model(path, tmp_path / "ours", "none", 0, 64)
    (tmp_path / "ours" / "chat_template.jinja").write_text("{{ messages }}")
    file = exported(tmp_path / "ours")
    fields = contents(file)[0]
    assert fields["general.license"] == "other" and fields["general.license.name"] == "llama3"
    assert fields["general.base_model.0.name"] == "Llama" and fields["tokenizer.chat_template"] == "{{ messages }}"
    assert (file.parent / "LICENSE").is_file() and "base_model: Llama" in (file.parent / "README.md").read_text()
    assert np.isin(["general.architecture", "general.file_type"], list(fields)).all()

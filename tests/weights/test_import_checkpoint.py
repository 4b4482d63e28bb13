"""Open checkpoints as directories, against transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.import_checkpoint import SHAPES, run
from openm6.compress.convert import import_model
from openm6.core.batch import pad
from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.model.config import ModelConfig
from openm6.model.files import load_model, shapes
from openm6.tasks.encode import encode_example
from openm6.tasks.task import Task
from openm6.weights.families import tensors
from openm6.weights.import_checkpoint import open_checkpoint
from tests.weights.checkpoints import (
    ODDITIES,
    VOCABULARY,
    assert_same,
    foreign_tokenizer,
    imported,
    logits,
    network,
    save,
)  # fmt: skip


@pytest.mark.parametrize("oddity", ODDITIES)
def test_logits_equal_transformers(oddity: str, tmp_path: Path) -> None:
    family, changes = ODDITIES[oddity]
    theirs = network(family, **changes)
    shards = {"max_shard_size": "60KB"} if oddity in ("llama", "qwen3_moe") else {}
    ours = imported(save(theirs, tmp_path / family, **shards))
    assert_same(ours, theirs)
    assert shapes(ours.config) == {one.name: one.shape for one in tensors(ours.config)}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_scaling": {
            "rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 64,
        }},
    ],
)  # fmt: skip
def test_configurations_of_older_versions_mean_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save(network("llama"), tmp_path / "llama")
    file = path / "config.json"
    content = json.loads(file.read_text())
    for key in ("rope_parameters", "head_dim"):
        content.pop(key, None)
    file.write_text(json.dumps(content | {key: value for key, value in keys.items() if value is not None}))
    assert_same(imported(path), AutoModelForCausalLM.from_pretrained(path).eval())


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_leave_the_old_ones_as_they_were(tied: bool, tmp_path: Path) -> None:
    theirs = network("qwen3", tie_word_embeddings=tied).bfloat16()
    path = save(theirs, tmp_path / "qwen3")
    config = import_model(path, tmp_path / "m6", "none", 16, 64)
    stored = load_file(tmp_path / "m6" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["embed.weight"][:VOCABULARY], theirs.model.embed_tokens.weight)
    for old, name in [(theirs.model.embed_tokens.weight, "embed.weight"), (theirs.lm_head.weight, "head.weight")]:
        if name not in stored:
            continue
        new = stored[name][VOCABULARY:].float()
        assert len(new) == config.vocab_size - VOCABULARY
        assert new.std(0).mean() == pytest.approx(0.1 * old.float().std().item(), rel=0.2)
        torch.testing.assert_close(new.mean(0), old.float().mean(0), atol=0.05, rtol=0)
    session = Session.load(tmp_path / "m6", trainable=True)
    tokenizer = session.processor.tokenizer
    assert (tokenizer.first_new_id, tokenizer.code_start) == (VOCABULARY, config.vocab_size - 16)
    assert session.processor.seen_tokens == frozenset(range(VOCABULARY))
    assert tokenizer.encode("the cat 12") == foreign_tokenizer().encode("the cat 12").ids


def test_tensors_of_several_chunks_and_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(network("llama", tie_word_embeddings=True), tmp_path / "llama")
    import_model(path, tmp_path / "one", "none", 8, 64)
    monkeypatch.setattr("openm6.weights.checkpoint.CHUNK", 1)
    monkeypatch.setattr("openm6.model.files.SHARD", 50_000)
    told: list[tuple[int, int]] = []
    import_model(path, tmp_path / "many", "none", 8, 64, lambda done, total: told.append((done, total)))
    one, many = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "many").state_dict()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert len(told) > 20 and told[-1][0] == told[-1][1]
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, atol=1e-6, rtol=0)  # means of new rows are summed in parts
        rows = VOCABULARY if name == "embed.weight" else len(tensor)
        assert torch.equal(many[name][:rows], tensor[:rows])


def test_an_image_encoder_is_added_on_request(tmp_path: Path) -> None:
    path = save(network("llama"), tmp_path / "llama")
    config = import_model(path, tmp_path / "stem", "stem", 0, 64)
    loaded = load_model(tmp_path / "stem")
    assert config.image_embedder == "stem" and 0 < loaded.image.row.std() < 0.5
    ids = np.arange(20)
    torch.testing.assert_close(logits(loaded, ids), logits(imported(path), ids))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Session]:
    place, theirs = tmp_path_factory.mktemp("qwen3"), network("qwen3")
    import_model(save(theirs, place / "theirs"), place / "ours", "none", 0, 128)
    return theirs, Session.load(place / "ours", trainable=True)


@settings(max_examples=20)
@given(text=st.text("the cat ，12", min_size=1, max_size=20), answer=st.text("the dog", min_size=1, max_size=9))
@torch.no_grad()
def test_a_task_is_read_as_transformers_reads_its_ids(
    both: tuple[torch.nn.Module, Session], text: str, answer: str
) -> None:
    """An imported model reads a source causally: source and answer give transformers' logits on the same ids."""
    theirs, ours = both
    assert ours.model.config.source == ours.processor.source == "causal"
    task = Task.from_instruction("[text:text] answer: -> [text:answer]")
    one = encode_example(task, {"text": text, "answer": answer}, ours.processor)
    known = one.ids < VOCABULARY
    ids = torch.from_numpy(np.where(known, one.ids, 0))[None].long()
    rows = ours.model.embed.weight[torch.from_numpy(one.ids).long()][None]
    expected = theirs(
        inputs_embeds=torch.where(torch.from_numpy(known)[None, :, None], theirs.model.embed_tokens(ids), rows)
    )
    logits = ours.model.logits(ours.model(pad([one], 0)).hidden)[0, :, :VOCABULARY]
    torch.testing.assert_close(logits, expected.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint() -> None:
    sizes = {**SHAPES["Qwen3-0.6B"], "num_hidden_layers": 8}
    (row,), _ = run({"of 8 layers": sizes}, 100_000)
    assert row["GB"] > 0.4 and row["peak, GB"] - row["libraries, GB"] < 0.25


CONFIGURATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gemma3"}, r'model_type is "gemma3"; what can be imported: llama, mistral, qwen2, qwen3'),
    ("llama", {"model_type": None}, "model_type is null; what can be imported"),
    ("llama", {"model_type": []}, r"model_type is \[\]; what can be imported"),
    ("llama", {"attention_bias": True}, "attention_bias is true; only false can be imported"),
    ("llama", {"mlp_bias": True}, "mlp_bias is true; only false"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu"'),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, 'quantization_config is {"quant_method": "gptq"}'),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type is "linear"; only default, llama3 and'),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 0, "rope_theta": 1e4}}, "factor is 0; give a number"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, 'rope_theta is "x"; it has to be'),
    ("llama", {"num_hidden_layers": -1}, "num_hidden_layers is -1; it has to be a number above 0"),
    ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; it has to be a number above 0"),
    ("llama", {"hidden_size": "64"}, "is not the configuration of a llama model: .*hidden_size"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads .4. has to be a multiple of .*num_key_value_heads .3."),
    ("mistral", {"sliding_window": 4096}, "sliding_window is 4096; only null"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true; only false"),
    ("qwen3", {"attention_bias": True}, "attention_bias is true; only false"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; only the first layers can be dense"),
]


@pytest.mark.parametrize(("family", "change", "reason"), CONFIGURATIONS)
def test_what_cannot_be_imported_is_refused_by_its_key(
    family: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save(network(family, **(ODDITIES[family][1] if family in ODDITIES else {})), tmp_path / family)
    content = json.loads((path / "config.json").read_text()) | change
    if "rope_scaling" in change:
        del content["rope_parameters"]
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"config\.json.*{reason}"):
        import_model(path, tmp_path / "m6", "none", 0, 64)
    assert not (tmp_path / "m6").exists()


def test_files_that_are_not_a_checkpoint_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a checkpoint: give a directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no config.json: give the directory of a Hugging Face checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"GGUF files: import one of them, such as .*small\.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a checkpoint: give a directory"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OpenM6Error, match=r"config.json is not valid JSON"):
        open_checkpoint(tmp_path)


def test_a_pickled_checkpoint_names_the_conversion(tmp_path: Path) -> None:
    path = save(network("llama"), tmp_path / "llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    for place in (path, path / "pytorch_model.bin"):
        with pytest.raises(UsageError, match=r"pytorch_model.bin is pickled: .*from_pretrained.*save_pretrained"):
            open_checkpoint(place)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = save(network("llama"), tmp_path / "llama", max_shard_size="60KB")
    shard = max(path.glob("*.safetensors"))
    shard.rename(path / "away")
    with pytest.raises(OpenM6Error, match=f"has no {shard.name}, which its model.safetensors.index.json names"):
        open_checkpoint(path)
    (path / "away").rename(shard)
    with shard.open("r+b") as data:
        data.truncate(shard.stat().st_size - 1)
    with pytest.raises(OpenM6Error, match="are truncated or damaged"):
        open_checkpoint(path)

    path = save(network("llama", tie_word_embeddings=True), tmp_path / "whole")
    stored = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for change, reason in [
        ({name: None}, f"has no tensor {name}"),
        ({name: stored[name][1:].clone()}, rf"{name} has the shape \[95, 64\]; by its configuration it is \[96, 64\]"),
        ({"model.layers.0.more.weight": torch.zeros(2)}, "holds model.layers.0.more.weight .and 0 more., which cannot"),
        ({"lm_head.weight": torch.zeros(VOCABULARY, 64)}, "tie_word_embeddings is true, but lm_head.weight is not"),
        ({name: stored[name].to(torch.float8_e4m3fn)}, f"{name} is of the type F8_E4M3; only F32, F16, BF16"),
    ]:
        changed = {key: value for key, value in (stored | change).items() if value is not None}
        save_file(changed, path / "model.safetensors")
        with pytest.raises(OpenM6Error, match=reason):
            open_checkpoint(path)
    same = {"lm_head.weight": stored["model.embed_tokens.weight"].clone(), "rotary_emb.inv_freq": torch.ones(2)}
    save_file(stored | same, path / "model.safetensors")
    open_checkpoint(path)


def test_sizes_that_files_do_not_have_allocate_nothing(tmp_path: Path) -> None:
    path = save(network("llama"), tmp_path / "llama")
    for key in ("num_hidden_layers", "vocab_size", "intermediate_size"):
        content = json.loads((path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | {key: 2**31 - 1}))
        (path / "config.json").rename(path / "kept.json")
        (tmp_path / "config.json").rename(path / "config.json")
        with pytest.raises(OpenM6Error, match="by its configuration it is|has no tensor"):
            open_checkpoint(path)
        (path / "kept.json").rename(path / "config.json")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    path = save(network("llama", vocab_size=200), tmp_path / "llama")
    with pytest.raises(UsageError, match="start_at is 200, but the tokenizer uses the ids up to"):
        import_model(path, tmp_path / "m6", "none", 0, 64)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="tokenizer.json does not exist"):
        import_model(path, tmp_path / "m6", "none", 0, 64)


def test_tables_of_families_know_every_tensor() -> None:
    for changes in ({"qkv_bias": True}, {"qk_norm": True, "num_experts": 4, "expert_interval": 2, "dense_layers": 1}):
        config = ModelConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, image_embedder="none", **changes,
        )  # fmt: skip
        assert shapes(config) == {one.name: one.shape for one in tensors(config)}

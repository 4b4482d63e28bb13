"""LoRA adapters in both forms, against PEFT on transformers' own classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from openm6.compress.convert import export_model, import_model
from openm6.core.errors import OpenM6Error, UsageError
from openm6.inference.session import Session
from openm6.model.adapters import adapter_config, add_adapter, stored_name
from openm6.tasks.card import read_origin, read_seen_tokens
from openm6.weights.lora import import_adapter
from tests.conftest import command
from tests.weights.checkpoints import ODDITIES, VOCABULARY, logits, network, save

IDS = np.random.default_rng(0).integers(0, VOCABULARY, 40)
DENSE = [name for name in ODDITIES if name not in ("qwen3_moe-interval", "qwen2-yarn", "qwen3-yarn")]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(tmp_path: Path, oddity: str = "llama") -> torch.nn.Module:
    """transformers' model, with its directory `theirs` and ours, `ours`."""
    family, changes = ODDITIES[oddity]
    theirs = network(family, **changes)
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 8, 64)
    return theirs


def trained(theirs: torch.nn.Module, path: Path, **options: Any) -> PeftModel:
    """An adapter by PEFT with random weights, saved."""
    adapted = get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ALL, **options})).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(path)
    return adapted


def ours_trained(tmp_path: Path, rows: list[int] | None = None, tied: bool = True) -> Path:
    """The directory of an adapter of `ours` as training writes it."""
    session = Session.load(tmp_path / "ours", "cpu", trainable=True)
    matrices = None if rows is None else dict.fromkeys(("embed",) if tied else ("embed", "head"), rows)
    config = adapter_config(tmp_path / "ours", "lora", rank=4, alpha=6, rows=matrices)
    add_adapter(session.model, config)
    torch.manual_seed(2)
    state = {n: torch.randn_like(p) * 0.2 for n, p in session.model.named_parameters() if p.requires_grad}
    session.describe(tmp_path / "adapter", config)
    save_file(
        {stored_name(name): value for name, value in state.items()}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    return tmp_path / "adapter"


def assert_same_file(one: Path, other: Path) -> None:
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype, name


def assert_same_logits(ours: Session, theirs: torch.nn.Module, count: int = VOCABULARY) -> None:
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)[None]).logits[0]
    torch.testing.assert_close(logits(ours.model, IDS)[:, :count], expected[:, :count], atol=1e-4, rtol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8},
    "queries and values": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 3},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"v_proj": 3, "down_proj": 1},
    },
    "one layer": {"layers_to_transform": [1], "r": 4, "init_lora_weights": "gaussian"},
    "rows": {"r": 4, "trainable_token_indices": [3, 299, 17]},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_theirs_gives_the_same_logits_here_and_comes_out_as_it_came_in(options: str, tmp_path: Path) -> None:
    theirs = base(tmp_path)
    adapted = trained(theirs, tmp_path / "peft", **OPTIONS[options])
    import_adapter(tmp_path / "peft", tmp_path / "ours", tmp_path / "adapter")
    assert_same_logits(Session.load(tmp_path / "adapter", "cpu", trainable=True), adapted)
    export_model(tmp_path / "adapter", tmp_path / "back", "huggingface")
    if options == "patterns":  # factors in B, where queries, keys and values have scales of their own
        opened = PeftModel.from_pretrained(network("llama", **ODDITIES["llama"][1]), tmp_path / "back").eval()
        assert_same_logits(Session.load(tmp_path / "adapter", "cpu", trainable=True), opened)
    else:
        assert_same_file(tmp_path / "peft", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == json.loads(
        (tmp_path / "peft" / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize("oddity", DENSE)
def test_theirs_of_every_family(oddity: str, tmp_path: Path) -> None:
    theirs = base(tmp_path, oddity)
    modules = ALL if "moe" not in oddity else ALL[:4]
    adapted = trained(theirs, tmp_path / "peft", target_modules=modules)
    import_adapter(tmp_path / "peft", tmp_path / "ours", tmp_path / "adapter")
    assert_same_logits(Session.load(tmp_path / "adapter", "cpu", trainable=True), adapted)


@pytest.mark.parametrize("oddity", [name for name in DENSE if name != "qwen3_moe-dense"])
def test_ours_gives_the_same_logits_there_and_comes_back_as_it_was(oddity: str, tmp_path: Path) -> None:
    theirs = base(tmp_path, oddity)
    path = ours_trained(tmp_path)
    export_model(path, tmp_path / "peft", "huggingface")
    opened = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    assert_same_logits(Session.load(path, "cpu", trainable=True), opened)
    import_adapter(tmp_path / "peft", tmp_path / "ours", tmp_path / "back")
    assert_same_file(path, tmp_path / "back")
    assert_same_logits(Session.load(tmp_path / "back", "cpu", trainable=True), opened)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_go_along(tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = network("qwen2", tie_word_embeddings=tied)
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 8, 64)
    tokenizer = Session.load(tmp_path / "ours").processor.tokenizer
    ids = [tokenizer.answer_id, tokenizer.end_id, 5]
    path = ours_trained(tmp_path, ids, tied)
    with caplog.at_level(logging.WARNING):
        export_model(path, tmp_path / "peft", "huggingface")
    rows = tokenizer.end_id + 1
    assert "README.md" in caplog.text
    assert f"resize_token_embeddings({rows}, " in (tmp_path / "peft" / "README.md").read_text()
    theirs.resize_token_embeddings(rows, mean_resizing=False)
    opened = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    ours = Session.load(path, "cpu", trainable=True)
    text = np.array([7, 8, ids[0], 5, 9, ids[1]])
    with torch.no_grad():
        expected = opened(torch.from_numpy(text)[None]).logits[0]
    known = [*range(VOCABULARY), *ids[:2]]
    torch.testing.assert_close(logits(ours.model, text)[:, known], expected[:, known], atol=1e-4, rtol=1e-4)
    import_adapter(tmp_path / "peft", tmp_path / "ours", tmp_path / "back")
    assert_same_file(path, tmp_path / "back")
    assert set(ids) <= (read_seen_tokens(tmp_path / "back") or set())
    (tmp_path / "peft" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="a token that was added to the checkpoint and that the model has not"):
        import_adapter(tmp_path / "peft", tmp_path / "ours", tmp_path / "other")


def test_dense_layers_beside_experts_are_refused(tmp_path: Path) -> None:
    base(tmp_path, "qwen3_moe-dense")
    with pytest.raises(UsageError, match="blocks.0.feed_forward.up, which PEFT would take for one of the experts"):
        export_model(ours_trained(tmp_path), tmp_path / "peft", "huggingface")


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    base(tmp_path)
    path = trained(network("llama"), tmp_path / "peft") and tmp_path / "peft"
    config = json.loads((path / "adapter_config.json").read_text())
    for changes, message in (
        ({"use_dora": True}, "use_dora is True; only products"),
        ({"bias": "all"}, "bias is 'all'; only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model"),
    ):
        (path / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UsageError, match=message):
            import_adapter(path, tmp_path / "ours", tmp_path / "out")
    (path / "adapter_config.json").write_text(json.dumps(config))
    file = path / "adapter_model.safetensors"
    weights = load_file(file)
    for extra, message in (
        (
            {
                "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(8, 64),
                "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.zeros(96, 8),
            },
            "adapts model.layers.7.mlp.up_proj, which is no linear layer",
        ),
        (
            {"base_model.model.lm_head.weight": torch.zeros(320, 64)},
            "lm_head.weight .320, 64., which cannot be converted",
        ),
        ({"base_model.model.model.norm.lora_A.weight": torch.zeros(8, 64)}, "no lora_A and lora_B"),
    ):
        save_file(weights | extra, file)
        with pytest.raises(UsageError, match=message):
            import_adapter(path, tmp_path / "ours", tmp_path / "out")
    file.unlink()
    (path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="pickled: .*PeftModel.from_pretrained"):
        import_adapter(path, tmp_path / "ours", tmp_path / "out")
    (path / "adapter_model.bin").unlink()
    with pytest.raises(OpenM6Error, match="has no adapter_model.safetensors"):
        import_adapter(path, tmp_path / "ours", tmp_path / "out")
    trained(network("llama", intermediate_size=64), tmp_path / "narrow")
    with pytest.raises(UsageError, match=r"gate_proj is \[64, 64\] there and \[96, 64\] here: .* another model"):
        import_adapter(tmp_path / "narrow", tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands(tmp_path: Path) -> None:
    theirs = base(tmp_path)
    (tmp_path / "ours" / "LICENSE").write_text("LLAMA LICENSE")
    adapted = trained(theirs, tmp_path / "peft", r=2)
    (tmp_path / "peft" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    words = "models", "import", tmp_path / "peft", tmp_path / "adapter"
    with pytest.raises(UsageError, match="give the model directory of its base, --base MODEL"):
        command(*words)
    with pytest.raises(UsageError, match="--num-codes does nothing here"):
        command(*words, "--base", tmp_path / "ours", "--num-codes", "8")
    with pytest.raises(UsageError, match="--base does nothing here"):
        command("models", "import", tmp_path / "theirs", tmp_path / "x", "--base", tmp_path / "ours")
    command(*words, "--base", tmp_path / "ours")
    assert read_origin(tmp_path / "adapter") == {
        "name": "theirs", "adapter_name": "peft", "adapter_license": "cc-by-nc-4.0",
    }  # fmt: skip
    command("models", "merge", tmp_path / "adapter", tmp_path / "merged")
    assert_same_logits(Session.load(tmp_path / "merged", "cpu", trainable=True), adapted)
    assert (tmp_path / "merged" / "LICENSE").is_file()
    command("models", "export", tmp_path / "adapter", tmp_path / "back", "--format", "huggingface")
    assert_same_file(tmp_path / "peft", tmp_path / "back")
    assert (tmp_path / "back" / "LICENSE").is_file() and "cc-by-nc-4.0" in (tmp_path / "back" / "README.md").read_text()
    with pytest.raises(UsageError, match="is an adapter: make it a model first"):
        command("models", "export", tmp_path / "adapter", tmp_path / "file", "--format", "gguf")

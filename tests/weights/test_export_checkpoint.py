"""Model directories as Hugging Face checkpoints, against what transformers' own classes save."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from openm6.compress.convert import export_model, import_model
from openm6.core.errors import OpenM6Error, UsageError
from openm6.core.tokenizer import SPECIAL, Tokenizer
from openm6.inference.session import Session
from openm6.model.files import load_model
from openm6.weights.directory import make_processor
from tests.conftest import command, tiny_model
from tests.weights.checkpoints import ODDITIES, VOCABULARY, foreign_tokenizer, logits, network, save


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(one: Path, other: Path) -> None:
    first, second = stored(one), stored(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_export_is_what_transformers_saves(oddity: str, tmp_path: Path) -> None:
    family, changes = ODDITIES[oddity]
    theirs = network(family, bos_token_id=0, **changes)
    theirs = theirs.bfloat16() if "yarn" in oddity else theirs
    save(theirs, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours", "none", 16, 64)
    export_model(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert_equal(tmp_path / "theirs", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "theirs" / "config.json").read_text()
    )
    import_model(tmp_path / "back", tmp_path / "again", "none", 16, 64)
    assert_equal(tmp_path / "ours", tmp_path / "again")
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_large_exports_are_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = network("qwen3_moe", **ODDITIES["qwen3_moe"][1])
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    monkeypatch.setattr("openm6.model.files.SHARD", 50_000)
    monkeypatch.setattr("openm6.weights.checkpoint.CHUNK", 1000)
    told: list[tuple[int, int]] = []
    export_model(tmp_path / "ours", tmp_path / "back", "huggingface", None, lambda *one: told.append(one))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3 and told[-1][0] == told[-1][1] and len(told) > 20
    assert_equal(tmp_path / "theirs", tmp_path / "back")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = torch.arange(40)[None]
    assert torch.equal(opened(ids).logits, theirs(ids).logits)


def test_another_precision_and_what_it_cannot_hold(tmp_path: Path) -> None:
    theirs = network("llama")
    import_model(save(theirs, tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    export_model(tmp_path / "ours", tmp_path / "half", "huggingface", "bf16")
    theirs.bfloat16().save_pretrained(tmp_path / "expected")
    assert_equal(tmp_path / "half", tmp_path / "expected")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs.model.norm.weight.data[3] = 1e5
    import_model(save(theirs, tmp_path / "large"), tmp_path / "m6", "none", 0, 64)
    with pytest.raises(OpenM6Error, match=r"model.norm.weight has numbers that f16 cannot hold"):
        export_model(tmp_path / "m6", tmp_path / "f16", "huggingface", "f16")
    assert not (tmp_path / "f16").exists()


def test_files_of_the_tokenizer_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    path = save(network("llama"), tmp_path / "theirs")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 512,
    }  # fmt: skip
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 0], "temperature": 0.6}')
    import_model(path, tmp_path / "ours", "none", 16, 64)
    export_model(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == json.loads(
        (path / "tokenizer.json").read_text()
    )
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == config
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == json.loads(
        (path / "generation_config.json").read_text()
    )
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == template
    opened = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert (
        opened.eos_token == "<|im_end|>"
        and opened("the cat 12").input_ids == foreign_tokenizer().encode("the cat 12").ids
    )


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, len(SPECIAL)), codes=st.booleans())
def test_rows_that_were_trained_are_kept(count: int, codes: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("rows")
    theirs = network("qwen2", num_hidden_layers=1, tie_word_embeddings=True, eos_token_id=1)
    import_model(save(theirs, place / "theirs"), place / "ours", "none", 8, 64)
    session = Session.load(place / "ours", trainable=True)
    seen = frozenset(range(VOCABULARY + count)) | (frozenset([VOCABULARY + len(SPECIAL)]) if codes else frozenset())
    session.processor = replace(session.processor, seen_tokens=seen)
    session.save(place / "trained")
    (place / "trained" / "generation_config.json").write_text('{"eos_token_id": 1}')
    export_model(place / "trained", place / "back", "huggingface")
    rows = stored(place / "back")["model.embed_tokens.weight"]
    assert torch.equal(rows, session.model.embed.weight[: VOCABULARY + count])
    opened, end = AutoTokenizer.from_pretrained(place / "back"), session.processor.tokenizer.end_id
    assert all(opened.convert_tokens_to_ids(token) == VOCABULARY + n for n, token in enumerate(SPECIAL[:count]))
    for name in ("config.json", "generation_config.json"):
        ends = json.loads((place / "back" / name).read_text())["eos_token_id"]
        assert ends == ([1, end] if end < VOCABULARY + count else 1)


def own_model(path: Path, **sizes: Any) -> Path:
    """The directory of a model that did not begin as a checkpoint."""
    tokenizer = Tokenizer.train(["红色连衣裙，又轻又软。"], 600, 8)
    sizes = {"image_embedder": "none", "source": "causal", "vocab_size": tokenizer.vocab_size, **sizes}
    model = tiny_model(num_codes=8, **sizes)
    Session(model, make_processor(model.config, tokenizer, 64)).save(path)
    return path


def test_a_model_from_nothing_is_exported_as_the_family_that_expresses_it(tmp_path: Path) -> None:
    path = own_model(tmp_path / "ours", qk_norm=True)
    export_model(path, tmp_path / "back", "huggingface")
    opened, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval(), load_model(path).eval()
    ids = np.arange(2, 30)
    found = opened(torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(found, logits(ours, ids)[:, : found.shape[1]], atol=1e-4, rtol=1e-4)
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "back"), Session.load(path).processor.tokenizer
    assert tokenizer("红色连衣裙 12").input_ids == own.encode("红色连衣裙 12")
    assert opened.config.eos_token_id == tokenizer.eos_token_id == own.end_id and opened.config.model_type == "qwen3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "bidirectional"}, 'llama, but model.source is "bidirectional", not "causal"'),
        ({"norm": "layer", "activation": "gelu"}, 'model.activation is "gelu", not "swiglu"; .*model.norm is "layer"'),
        ({"qk_norm": True, "qkv_bias": True}, "qwen2, but model.qk_norm is true, not false"),
        ({"positions": "learned"}, 'model.positions is "learned"'),
        ({"num_experts": 4, "experts_per_token": 2, "router": "prototype", "qk_norm": True},
         'the nearest is qwen3_moe, but model.router is "prototype", not "topk"'),
        ({"num_experts": 4, "experts_per_token": 2, "shared_intermediate_size": 8, "qk_norm": True},
         "model.shared_intermediate_size is 8, not 0"),
    ],
)  # fmt: skip
def test_what_no_family_expresses_is_refused_by_its_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    own_model(tmp_path / "ours", **changes)
    with pytest.raises(UsageError, match=message):
        export_model(tmp_path / "ours", tmp_path / "back", "huggingface")


def test_what_stays_behind_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(network("llama"), tmp_path / "theirs")
    import_model(path, tmp_path / "ours", "stem", 8, 64)
    with caplog.at_level(logging.WARNING):
        export_model(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert "reads and writes texts alone: its image encoder stay" in caplog.text
    assert_equal(path, tmp_path / "back")


def test_options_of_another_format_are_refused(tmp_path: Path) -> None:
    import_model(save(network("llama"), tmp_path / "theirs"), tmp_path / "ours", "none", 0, 64)
    ours, out = str(tmp_path / "ours"), str(tmp_path / "out")
    for options, message in (
        (("--format", "huggingface", "--bits", "8"), "--bits does nothing here"),
        (("--dtype", "bf16"), "--dtype does nothing here"),
        (("--format", "huggingface", "--dtype", "q8_0"), "q8_0 is for --format gguf"),
    ):
        with pytest.raises(UsageError, match=message):
            command("models", "export", ours, out, *options)
    assert command("models", "export", ours, out, "--format", "huggingface").exit_code == 0

"""Qwen3 checkpoints against transformers' own Qwen3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from openm6.core.batch import pad
from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, Sequence
from openm6.core.tokenizer import Tokenizer
from openm6.inference.session import Session
from openm6.tasks.encode import encode_example
from openm6.tasks.task import Task
from openm6.weights.directory import make_processor
from openm6.weights.import_qwen3 import import_qwen3

SHAPES = [
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False},
]


EXPERTS = [
    {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True},
    {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 96, "decoder_sparse_step": 2},
    {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [0]},
]


def checkpoint(path: Path, shape: dict, **save: object) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    sizes = {
        "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "rope_theta": 1e6,
        "max_position_embeddings": 512, "initializer_range": 0.2, **shape,
    }  # fmt: skip
    sparse = "num_experts" in shape
    model = (Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)) if sparse else Qwen3ForCausalLM(Qwen3Config(**sizes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path, **save)
    return model


def text(ids: np.ndarray) -> Sequence:
    n = len(ids)
    return Sequence(ids.astype(np.int32), np.full(n, CAUSAL, np.int32), np.full(n, IGNORE, np.int32))


@pytest.mark.parametrize("shape", [*SHAPES, *({**SHAPES[0], **experts} for experts in EXPERTS)])
@pytest.mark.parametrize("save", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
def test_logits_equal_transformers(tmp_path: Path, shape: dict, save: dict) -> None:
    theirs = checkpoint(tmp_path, shape, **save)
    ours = import_qwen3(tmp_path, image_embedder="stem", stem_widths=[8, 8, 8]).eval()
    ids = np.random.default_rng(0).integers(0, 120, 50)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)[None]).logits[0]
        logits = ours.logits(ours(pad([text(ids)], 0)).hidden)[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3ForCausalLM, Session]:
    place, tokenizer = tmp_path_factory.mktemp("qwen3"), Tokenizer.train(["今天天气很好"], 400, num_codes=0)
    theirs = checkpoint(place, {**SHAPES[0], "vocab_size": tokenizer.vocab_size})
    model = import_qwen3(place, image_embedder="none").eval()
    return theirs, Session(model, make_processor(model.config, tokenizer, 128))


@settings(max_examples=20)
@given(text=st.text("今天天气很好ab ，", max_size=20), answer=st.text("今天天气很好ab ，", max_size=9))
@torch.no_grad()
def test_a_task_is_read_as_transformers_reads_its_ids(
    imported: tuple[Qwen3ForCausalLM, Session], text: str, answer: str
) -> None:
    """An imported model reads a source causally: source and answer give transformers' logits on the same ids."""
    theirs, ours = imported
    assert ours.model.config.source == "causal"
    task = Task.from_instruction("[text:text] 回答: -> [text:answer]")
    one = encode_example(task, {"text": text or "天", "answer": answer or "好"}, ours.processor)
    expected = theirs(torch.from_numpy(one.ids)[None].long()).logits[0]
    logits = ours.model.logits(ours.model(pad([one], 0)).hidden)[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_new_tokens_leave_the_old_ones_as_they_were(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, SHAPES[1])
    ours = import_qwen3(tmp_path, vocab_size=140, image_embedder="none").eval()
    ids = np.random.default_rng(0).integers(0, 120, 20)
    with torch.no_grad():
        logits = ours.logits(ours(pad([text(ids)], 0)).hidden)[0]
        torch.testing.assert_close(logits[:, :120], theirs(torch.from_numpy(ids)[None]).logits[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.embed.weight[:120], theirs.model.embed_tokens.weight)
    assert ours.config.vocab_size == 140 and logits.shape[1] == 140


def test_dense_layers_after_experts_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, {**SHAPES[0], **EXPERTS[0], "mlp_only_layers": [1]})
    with pytest.raises(UsageError, match=r"dense layers \[1\] among its experts"):
        import_qwen3(tmp_path)


def test_what_is_no_qwen3_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match='holds a "llama" model; what can be imported: qwen3'):
        import_qwen3(tmp_path)
    with pytest.raises(UsageError, match="has no config.json"):
        import_qwen3(tmp_path / "nowhere")
    checkpoint(tmp_path / "q", SHAPES[0])
    with pytest.raises(UsageError, match="smaller than the checkpoint's 120"):
        import_qwen3(tmp_path / "q", vocab_size=100)
    for file in (tmp_path / "q").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UsageError, match="no safetensors"):
        import_qwen3(tmp_path / "q")

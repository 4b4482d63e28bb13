"""M6 under transformers' interface of language models, against our own decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM

import openm6.hf
from openm6.core.batch import pad
from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, Sequence
from openm6.inference.decoding import Decoding
from openm6.inference.generate import generate
from openm6.model.files import save_network
from tests.conftest import VOCABULARY, tiny_model

END = 1
KINDS = {
    "modern": {}, "papers": {"norm": "layer", "activation": "gelu", "positions": "learned"},
    "experts": {"num_experts": 4, "experts_per_token": 2, "router": "prototype", "num_key_value_heads": 2},
    "shared": {"distinct_layers": 1, "qk_norm": True, "tie_word_embeddings": False},
}  # fmt: skip


def prompt(ids: np.ndarray, source: bool) -> Sequence:
    n = len(ids)
    return Sequence(ids, np.full(n, SOURCE if source else CAUSAL, np.int32), np.full(n, IGNORE, np.int32))


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, ...]:
    ours = tiny_model(**KINDS[request.param])
    path = tmp_path_factory.mktemp(request.param)
    save_network(ours, path)
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    assert isinstance(theirs, openm6.hf.M6ForCausalLM)
    return ours, theirs


def batch(lengths: list[int], seed: int, left: bool) -> tuple[list[np.ndarray], torch.Tensor, torch.Tensor]:
    """Texts of these lengths, and one row for each, padded on the left or on the right, with its attention mask."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(2, VOCABULARY, n).astype(np.int32) for n in lengths]
    ids, mask = torch.zeros(len(texts), max(lengths), dtype=torch.int64), torch.zeros(len(texts), max(lengths))
    for row, text in enumerate(texts):
        place = slice(max(lengths) - len(text), None) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.from_numpy(text).long(), 1
    return texts, ids, mask


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99), left=st.booleans(),
       source=st.booleans())  # fmt: skip
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_network(
    both: tuple[torch.nn.Module, ...], lengths: list[int], seed: int, left: bool, source: bool
) -> None:
    ours, theirs = both
    texts, ids, mask = batch(lengths, seed, left)
    labels = ids.masked_fill(mask.cumsum(1) * mask <= 1, IGNORE)  # padding would predict the first token of a text
    found = theirs(input_ids=ids, attention_mask=mask, labels=labels, source_mask=mask if source else None)
    losses = []
    for row, text in enumerate(texts):
        expected = ours.logits(ours(pad([prompt(text, source)], 0)).hidden)[0]
        torch.testing.assert_close(found.logits[row][mask[row] > 0], expected, atol=1e-4, rtol=1e-4)
        losses += torch.nn.functional.cross_entropy(expected[:-1], torch.from_numpy(text[1:]).long(), reduction="none")
    if losses:
        torch.testing.assert_close(found.loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99), source=st.booleans(),
       beams=st.sampled_from([1, 3]))  # fmt: skip
def test_generate_gives_our_answers(
    both: tuple[torch.nn.Module, ...], lengths: list[int], seed: int, source: bool, beams: int
) -> None:
    ours, theirs = both
    texts, ids, mask = batch(lengths, seed, left=True)
    found = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=END, pad_token_id=0, num_beams=beams,
        **({"source_mask": mask} if source else {}),
    )[:, ids.shape[1] :]  # fmt: skip
    again = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=END, pad_token_id=0, num_beams=beams,
        use_cache=False, **({"source_mask": mask} if source else {}),
    )[:, ids.shape[1] :]  # fmt: skip
    assert torch.equal(found, again)
    if beams == 1:
        expected = generate(ours, [prompt(text, source) for text in texts], [END], Decoding(max_new_tokens=8))
        for row, one in zip(found.tolist(), expected, strict=True):
            assert row[: len(one.ids)] == one.ids
            assert row[len(one.ids) : len(one.ids) + 1] in ([], [END])


def test_it_is_trained_and_saved(both: tuple[torch.nn.Module, ...], tmp_path: Path) -> None:
    _, theirs = both
    model = openm6.hf.M6ForCausalLM(theirs.config).train()
    model.load_state_dict(theirs.state_dict())
    ids = torch.arange(2, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    used = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(".image." in name for name in used)
    theirs.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_quantized_weights_are_refused() -> None:
    config = openm6.hf.M6Config(**{**tiny_model().config.to_dict(), "weight_bits": 8})
    with pytest.raises(UsageError, match="weights are quantized"):
        openm6.hf.M6ForCausalLM(config)

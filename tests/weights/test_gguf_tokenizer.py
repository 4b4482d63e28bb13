"""Tokenizers rebuilt from a GGUF file's metadata, against the tokenizer.json that the metadata come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

from openm6.weights.gguf_tokenizer import gguf_tokenizer

TEXTS = [
    "The cat's 1234 cats sat\n\n  on the mat, wasn't it?",
    "猫坐在垫子上。今天天气很好",
    "e\u0301té naïve, 12,345.67 €",
]


def trained(name: str) -> tokenizers.Tokenizer:
    """A byte-level vocabulary with what tokenizer.json of Qwen2, Llama 3 and SmolLM2 say of cutting texts."""
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    if name == "smollm":
        cut, regex = pre_tokenizers.Digits(individual_digits=True), True
    else:
        cut, regex = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), False
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    if name == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    fast.train_from_iterator([*TEXTS, "the cat sat on the mat 2024"] * 3, trainer)
    fast.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    fast.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return fast


def fields_of(fast: tokenizers.Tokenizer, name: str) -> dict[str, Any]:
    """As llama.cpp's converter writes them."""
    content = json.loads(fast.to_str())
    vocabulary = fast.get_vocab(with_added_tokens=True)
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*tokens, "[PAD1]"],
        "tokenizer.ggml.token_type": [{None: 1, True: 3, False: 4}[special.get(token)] for token in tokens] + [5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
    }  # fmt: skip


PAIRS = {}
for _name in ("qwen2", "llama-bpe", "smollm"):
    _fast = trained(_name)
    PAIRS[_name] = (_fast, gguf_tokenizer(fields_of(_fast, _name), Path("model.gguf")))


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(), st.sampled_from(TEXTS), st.text(alphabet="the cat's 12\n<|end|>think.e\u0301 ")))
def test_texts_have_the_ids_of_the_original(name: str, text: str) -> None:
    original, rebuilt = PAIRS[name]
    for as_text in (True, False):  # special tokens in a text are text, or are themselves
        original.encode_special_tokens = rebuilt.encode_special_tokens = as_text
        ids = original.encode(text).ids
        assert rebuilt.encode(text).ids == ids
    assert rebuilt.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_sentencepiece_vocabularies_merge_by_their_scores() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "d"]
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-1.0 * number for number in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
    }  # fmt: skip
    fast = gguf_tokenizer(fields, Path("model.gguf"))
    vocabulary = {piece: number for number, piece in enumerate(pieces + words)}
    # By score: "▁a" joins first, then "bc"; "▁ab" needs "▁a" and "b", and "b" is gone.
    assert fast.encode("abc", add_special_tokens=False).ids == [vocabulary["▁a"], vocabulary["bc"]]
    assert fast.encode("dé", add_special_tokens=False).tokens == ["▁", "d", "<0xC3>", "<0xA9>"]
    assert fast.decode(fast.encode("abc dé", add_special_tokens=False).ids) == "abc dé"

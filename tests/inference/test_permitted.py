"""Whatever the network says, what is written is whole characters, and U+FFFD is none of them."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings, strategies as st

from openm6.core.images import ImageGrid
from openm6.core.sequence import Constraint, Sequence, TextTarget, allowed_after
from openm6.core.tokenizer import HALF, SPECIAL, Tokenizer
from openm6.edge.runner import _likeliest
from openm6.inference import Decoding
from openm6.inference.generate import row_generator, select_tokens
from openm6.inference.permitted import permitted
from openm6.inference.pieces import Pieces
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.constraints import Limits
from openm6.tasks.forms import characters
from openm6.tasks.library import task_from_dict
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from tests.conftest import tiny_config

TEXTS = ["红色的靠垫，\ufffd羊毛￥95。", "a red \ufffd cushion 😀"] * 9


def byte_level() -> Tokenizer:
    """Tokens that begin or end within a character, and one of the three bytes of U+FFFD."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([*TEXTS, *[HALF * 4] * 99], trainer)
    fast.add_special_tokens(list(SPECIAL))
    return Tokenizer(fast, num_codes=4)


TOKENIZERS = {
    "bytes": Tokenizer.train(["红色 red"], 400, num_codes=4),
    "a token of its own": Tokenizer.train(TEXTS, 400, num_codes=4),
    "byte level": byte_level(),
}
tokenizer_names = st.sampled_from(list(TOKENIZERS))


def some_logits(tokenizer: Tokenizer, random: torch.Generator) -> torch.Tensor:
    """Of a network that likes bytes, those of U+FFFD most of all."""
    logits = torch.randn(1, tokenizer.vocab_size, generator=random)
    logits[0, list(tokenizer.parts)] += 2 * float(torch.rand(1, generator=random))
    logits[0, sorted({*tokenizer.encode(HALF), *tokenizer.damaged})] += 6 * float(torch.rand(1, generator=random))
    return logits


def prompt_of(constraint: Constraint | None) -> Sequence:
    empty = np.zeros(1, np.int32)
    return Sequence(empty, empty, empty, target=TextTarget(constraint))


def test_the_tokenizers_can_say_it() -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode(HALF)) == HALF
    assert TOKENIZERS["a token of its own"].damaged and not TOKENIZERS["bytes"].damaged
    assert any(len(part) > 1 for part in TOKENIZERS["byte level"].parts.values())


@pytest.mark.slow
@settings(max_examples=150)
@given(
    tokenizer_names, st.integers(0, 2**31), st.booleans(),
    st.sampled_from([
        {}, {"temperature": 1.0}, {"temperature": 3.0, "top_k": 20}, {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 3.0}, {"temperature": 1.0, "top_p": 0.5},
    ]),
)  # fmt: skip
def test_no_logits_write_half_a_character(name: str, seed: int, limited: bool, options: dict) -> None:
    """In each way of choosing, with limits and without; a text that is cut anywhere tells its whole characters."""
    tokenizer = TOKENIZERS[name]
    decoding, random = Decoding(seed=seed % 1000, **options), torch.Generator().manual_seed(seed)
    drawing, ids, pieces, told = row_generator(decoding), list[int](), Pieces(tokenizer), ""
    prompt = prompt_of(Limits(tokenizer, ["红色"], most=20) if limited else characters(tokenizer))
    for _ in range(24):
        logits = permitted(some_logits(tokenizer, random), [prompt], [ids], [decoding], tokenizer.end_id)
        token = int(select_tokens(logits, [decoding], [drawing])[0])
        if token == tokenizer.end_id:
            break
        ids.append(token)
        told += pieces.add(token)
        assert HALF not in tokenizer.decode(ids) and tokenizer.decode(ids).startswith(told)
        whole = ids  # nothing is torn but what has just begun
        while tokenizer.begun(whole):
            whole = whole[:-1]
        assert HALF not in tokenizer.decode_torn(whole)
    assert told + pieces.rest() == tokenizer.decode(ids)


@given(tokenizer_names, st.integers(0, 2**31))
def test_the_edge_keeps_them_too(name: str, seed: int) -> None:
    tokenizer, ids = TOKENIZERS[name], list[int]()
    prompt, random = prompt_of(characters(tokenizer)), torch.Generator().manual_seed(seed)
    for _ in range(16):
        allowed = allowed_after(prompt, ids, tokenizer.end_id)
        token, _ = _likeliest(some_logits(tokenizer, random)[0].numpy(), allowed)
        if token == tokenizer.end_id:
            break
        ids.append(token)
        assert HALF not in tokenizer.decode(ids)


@given(tokenizer_names, st.text("红色的靠垫羊毛￥￼ab é😀,。 1龘", max_size=12))
def test_texts_of_whole_characters_are_let_through(name: str, text: str) -> None:
    """Greedy answers that were whole stay as they were."""
    tokenizer = TOKENIZERS[name]
    prompt, ids = prompt_of(characters(tokenizer)), [*tokenizer.encode(text), tokenizer.end_id]
    for place, token in enumerate(ids):
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, token] = 9
        logits = permitted(logits, [prompt], [ids[:place]], [Decoding()], tokenizer.end_id)
        assert int(logits.argmax()) == token


def test_others_of_the_batch_are_left_alone() -> None:
    tokenizer = TOKENIZERS["bytes"]
    begun = tokenizer.encode("龘")[:1]
    logits = torch.randn(3, tokenizer.vocab_size)
    free = prompt_of(None)
    found = permitted(
        logits.clone(), [free, prompt_of(characters(tokenizer)), free], [begun, begun, []], [Decoding()] * 3,
        tokenizer.end_id,
    )  # fmt: skip
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert set(torch.isfinite(found[1]).nonzero().flatten().tolist()) < set(tokenizer.parts)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("sketch", [False, True])
def test_a_prompt_that_says_it_is_answered_without(name: str, sketch: bool) -> None:
    tokenizer = TOKENIZERS[name]
    task = Task.from_instruction("[text:a] -> [text:b]")
    if sketch:
        task = task_from_dict({**task.to_dict(), "name": "edit", "sketch": "a"})
    torch.manual_seed(3)
    model = M6(tiny_config(vocab_size=tokenizer.vocab_size, num_codes=4, initializer_range=0.3)).eval()
    with torch.no_grad():
        model.embed.weight[sorted({*tokenizer.encode(HALF), *tokenizer.damaged})] *= 4
    session = Session(model, Processor(tokenizer, ImageGrid(8, 16), 64))
    asked = [{"a": HALF * n + "红" * (4 - n)} for n in range(5)]
    for options in ({}, {"temperature": 2.0}, {"num_beams": 3}):
        for text in session.run_many(task, asked, decoding={"max_new_tokens": 12, **options}):
            assert HALF not in text

"""Decoding against an uncached loop over the whole sequence, and beams against exhaustive search."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from openm6.core.batch import pad
from openm6.core.errors import UsageError
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, SOURCE_BLOCKS, Sequence, TextTarget
from openm6.inference import Decoding, generate, stream
from openm6.inference.draw import Drawing
from openm6.inference.generate import row_generator, sample, select_tokens
from openm6.inference.permitted import permitted
from openm6.model import M6
from openm6.model.cache import prefill, step
from openm6.model.cpu.pack import pack_for_cpu
from tests.conftest import EXPERTS, YARN, example, tiny_model

END = 5


def prompt(rng: np.random.Generator, source: int, pictures: tuple = (), read: str = "bidirectional") -> Sequence:
    return example(rng, source, 1, pictures, read=read)


def grown(sequence: Sequence, ids: list[int]) -> Sequence:
    n = len(ids)
    return Sequence(
        np.concatenate([sequence.ids, np.array(ids, np.int32)]),
        np.concatenate([sequence.blocks, np.full(n, CAUSAL, np.int32)]),
        np.full(len(sequence) + n, IGNORE, np.int32),
        sequence.pictures,
    )


@torch.no_grad()
def next_log_probs(model: M6, sequence: Sequence, ids: list[int]) -> torch.Tensor:
    """The slow reference: everything computed again, alone, without a cache."""
    return model.logits(model(pad([grown(sequence, ids)], 0)).hidden[0, -1]).log_softmax(-1)


def slow_greedy(model: M6, sequence: Sequence, count: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < count:
        token = int(next_log_probs(model, sequence, ids).argmax())
        if token == END:
            break
        ids.append(token)
    return ids


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from([(), ((1, 2),), ((2, 2), (1, 1))])), min_size=1, max_size=5),
    st.sampled_from(
        [{}, {"positions": "learned", "norm": "layer", "activation": "gelu"}, {"num_key_value_heads": 2}, EXPERTS]
    ),
    st.sampled_from([*SOURCE_BLOCKS]),
)
def test_cached_batched_greedy_equals_the_uncached_loop(parts: list, changes: dict, read: str) -> None:
    model = tiny_model(**changes)
    rng = np.random.default_rng(0)
    prompts = [prompt(rng, source, pictures, read) for source, pictures in parts]
    answers = generate(model, prompts, [END], Decoding(max_new_tokens=8), batch_size=3)
    for sequence, answer in zip(prompts, answers, strict=True):
        assert answer.ids == slow_greedy(model, sequence, 8)
        assert answer.finished == (len(answer.ids) < 8)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5), st.sampled_from([*SOURCE_BLOCKS]))
@torch.no_grad()
def test_steps_on_a_cache_are_a_whole_forward_pass(sources: list[int], count: int, read: str) -> None:
    model, rng = tiny_model(), np.random.default_rng(1)
    prompts = [prompt(rng, source, read=read) for source in sources]
    ids = rng.integers(1, 97, (len(prompts), count))
    hidden, cache = prefill(model, pad(prompts, 0, rounded=True), max(map(len, prompts)) + count)
    found = torch.stack([hidden, *(step(model, torch.from_numpy(column), cache) for column in ids.T)], 1)
    for row, sequence in enumerate(prompts):
        whole = model(pad([grown(sequence, ids[row].tolist())], 0)).hidden[0, -count - 1 :]
        torch.testing.assert_close(found[row], whole, atol=1e-4, rtol=1e-3)


@given(st.integers(2, 12), st.data())
@settings(max_examples=10)
@torch.no_grad()
def test_a_causal_prompt_may_be_read_in_parts(length: int, data: st.DataObject) -> None:
    model, whole = tiny_model(), prompt(np.random.default_rng(2), length, read="causal")
    first = data.draw(st.integers(1, length))
    begun = Sequence(whole.ids[:first], whole.blocks[:first], whole.labels[:first])
    hidden, cache = prefill(model, pad([begun], 0), length + 1)
    for token in whole.ids[first:]:
        hidden = step(model, torch.tensor([int(token)]), cache)
    torch.testing.assert_close(hidden, prefill(model, pad([whole], 0), length + 1)[0], atol=1e-4, rtol=1e-3)


def test_score_is_the_log_probability_of_the_answer() -> None:
    model = tiny_model()
    sequence = prompt(np.random.default_rng(1), 4)
    answer = generate(model, [sequence], [END], Decoding(max_new_tokens=6))[0]
    ids = [*answer.ids, END] if answer.finished else answer.ids
    expected = sum(float(next_log_probs(model, sequence, ids[:i])[token]) for i, token in enumerate(ids))
    assert answer.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"norm": "layer", "activation": "gelu", "bias": True}, {"qk_norm": True}, EXPERTS,
        {"qkv_bias": True, "rotary_scaling": YARN},
    ],
)  # fmt: skip
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 2e-2), (torch.float32, 1e-4)])
def test_weights_laid_out_for_the_cpu_give_the_scores_of_fp32(
    changes: dict, onednn: bool, dtype: torch.dtype | None, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**changes)
    if not onednn:
        monkeypatch.setattr("openm6.model.cpu.packed._has_onednn", lambda: False)
    packed = pack_for_cpu(copy.deepcopy(model), dtype)
    rng = np.random.default_rng(4)
    prompts = [prompt(rng, source, ((1, 2),)) for source in (1, 4, 4, 9)]
    answers = [*generate(packed, prompts, [END], Decoding(6)), *generate(packed, prompts[1:3], [END], Decoding(6))]
    for p, answer in zip([*prompts, *prompts[1:3]], answers, strict=True):
        ids = answer.ids + ([END] if answer.finished else [])
        expected = sum(float(next_log_probs(model, p, ids[:i])[token]) for i, token in enumerate(ids))
        assert answer.score == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    model = tiny_model()
    rng = np.random.default_rng(2)
    prompts = [prompt(rng, n) for n in (2, 5, 3, 7)]
    options = Decoding(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=3)
    together = [a.ids for a in generate(model, prompts, [END], options)]
    assert together == [a.ids for a in generate(model, prompts, [END], options, batch_size=1)]
    assert together != [a.ids for a in generate(model, prompts, [END], Decoding(10, 1.0, top_p=0.9, seed=4))]


def test_streamed_tokens_are_the_generated_ones() -> None:
    model = tiny_model()
    sequence = prompt(np.random.default_rng(3), 5)
    for options in (Decoding(max_new_tokens=9), Decoding(max_new_tokens=9, temperature=1.0, seed=1)):
        assert list(stream(model, sequence, [END], options)) == generate(model, [sequence], [END], options)[0].ids


def test_wide_beam_finds_the_best_of_all_sequences() -> None:
    model = tiny_model(vocab_size=6)
    with torch.no_grad():
        model.embed.weight.mul_(3)
    ids = np.array([1, 2, 3, 4], np.int32)
    blocks = np.array([SOURCE] * 3 + [CAUSAL], np.int32)
    sequence = Sequence(ids, blocks, np.full(4, IGNORE, np.int32))
    longest = 3
    best, best_score = [], -np.inf
    for length in range(longest + 1):
        for tokens in itertools.product([t for t in range(6) if t != END], repeat=length):
            ended = [*tokens, END] if length < longest else list(tokens)
            score = sum(float(next_log_probs(model, sequence, ended[:i])[t]) for i, t in enumerate(ended))
            if score / len(ended) > best_score:
                best, best_score = list(tokens), score / len(ended)
    answer = generate(model, [sequence, sequence], [END], Decoding(max_new_tokens=longest, num_beams=216))
    assert answer[0].ids == answer[1].ids == best
    assert answer[0].score == pytest.approx(best_score * (len(best) + answer[0].finished), abs=1e-4)


def test_one_beam_is_greedy_and_more_beams_score_no_worse() -> None:
    model = tiny_model()
    rng = np.random.default_rng(5)
    prompts = [prompt(rng, n) for n in (2, 6, 4)]
    greedy = generate(model, prompts, [END], Decoding(max_new_tokens=6, length_penalty=0.0))
    beams = generate(model, prompts, [END], Decoding(max_new_tokens=6, num_beams=8, length_penalty=0.0))
    for a, b in zip(greedy, beams, strict=True):
        assert b.score >= a.score - 1e-4


class Only:
    """Allows two fixed answers."""

    answers = ([7, 8], [7, 9, 10])

    def next(self, prefix: list[int]) -> list[int]:
        n = len(prefix)
        return sorted({(a[n] if n < len(a) else END) for a in self.answers if list(a[:n]) == list(prefix)})


@pytest.mark.parametrize("options", [Decoding(8), Decoding(8, num_beams=3), Decoding(8, temperature=2.0)])
def test_constrained_answers_are_allowed_ones(options: Decoding) -> None:
    rng, model = np.random.default_rng(6), tiny_model()
    prompts = [prompt(rng, n) for n in (1, 4, 6)]
    prompts[0].target = prompts[2].target = TextTarget(Only())
    found = generate(model, prompts, [END], options)
    for answer in (found[0], found[2]):
        assert answer.ids in list(Only.answers) and answer.finished
    free = generate(model, prompts[1:2], [END], options)[0]
    if options.temperature == 0:  # what is drawn depends on the place in the call
        assert found[1].ids == free.ids


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.floats(0, 0.999), st.integers(1, 12), st.floats(0.05, 1))
def test_sampling_stays_within_top_k_and_top_p(values: list[float], draw: float, k: int, p: float) -> None:
    logits = torch.tensor([values])
    token = int(sample(logits.clone(), torch.tensor([draw]), k, p)[0])
    probs = logits.softmax(-1)[0]
    order = probs.sort(descending=True, stable=True).indices.tolist()
    assert order.index(token) < k
    kept = probs[order[:k]] / probs[order[:k]].sum()
    assert float(kept[: order.index(token)].sum()) < p + 1e-6


def test_sampling_draws_in_proportion() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(20_000, 3)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(sample(logits, draws), minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.02, rtol=0)


def test_bad_options_are_named() -> None:
    with pytest.raises(UsageError, match="no option temprature. Did you mean"):
        Decoding.of(temprature=1)
    with pytest.raises(UsageError, match="top_p is 1.5; it has to be between"):
        Decoding(top_p=1.5)
    with pytest.raises(UsageError, match="num_beams and temperature exclude"):
        Decoding(num_beams=2, temperature=1.0)
    with pytest.raises(UsageError, match="cannot stream"):
        list(stream(tiny_model(), prompt(np.random.default_rng(0), 2), [END], Decoding(num_beams=2)))


@given(st.lists(st.integers(0, 9), max_size=14), st.floats(0.5, 2), st.integers(0, 4))
def test_repetitions_are_held_back_as_transformers_does(written: list[int], penalty: float, size: int) -> None:
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(1, 40), torch.tensor([written], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    if size:
        expected = NoRepeatNGramLogitsProcessor(size)(ids, expected)
    options = Decoding(repetition_penalty=penalty, no_repeat_ngram_size=size)
    found = permitted(logits.clone(), [prompt(np.random.default_rng(0), 3)], [written], [options], END)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_k": 3}, {"num_beams": 3}])
def test_no_n_gram_occurs_twice_and_penalized_tokens_less_often(more: dict) -> None:
    rng, model = np.random.default_rng(3), tiny_model()
    prompts = [prompt(rng, n) for n in (2, 5, 9)]
    free, held = (
        generate(model, prompts, [END], Decoding(30, **more, **options))
        for options in ({}, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3})
    )
    assert any(len(set(itertools.pairwise(one.ids))) < len(one.ids) - 1 for one in free)
    assert all(len(set(itertools.pairwise(one.ids))) == max(len(one.ids) - 1, 0) for one in held)
    assert sum(len(set(one.ids)) / len(one.ids) for one in held) > sum(len(set(one.ids)) / len(one.ids) for one in free)


def test_a_constraint_goes_before_an_n_gram() -> None:
    class Twice(Only):
        answers = ([7, 7, 7],)

    asked = prompt(np.random.default_rng(0), 4)
    asked.target = TextTarget(Twice())
    for options in (Decoding(8, no_repeat_ngram_size=1), Decoding(8, no_repeat_ngram_size=1, num_beams=2)):
        found = generate(tiny_model(), [asked], [END], options)[0]
        assert found.ids == [7, 7, 7] and math.isfinite(found.score)


@pytest.mark.parametrize("temperature", [1e-3, 1e-39, 1e-45, 1e-320])
def test_a_temperature_near_nothing_draws_among_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3.0, -2.0, 3.0], [-90.0, -80.0, -torch.inf, -81.0]]).repeat(200, 1)
    generators = [row_generator(Decoding(temperature=temperature), number) for number in range(400)]
    tokens, log_probs = select_tokens(logits, [Decoding(temperature=temperature)] * 400, generators)
    assert log_probs.isfinite().all()
    assert set(tokens[::2].tolist()) == {1, 3} and set(tokens[1::2].tolist()) == {1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, 0.5])
@pytest.mark.parametrize("options", [Decoding, Drawing])
def test_an_option_that_is_no_number_in_its_range_is_refused(options: type, value: object) -> None:
    for field in dataclasses.fields(options):
        if value == 0.5 and not isinstance(field.default, int):
            continue
        with pytest.raises(UsageError, match=f"{field.name} is .*; it has to be"):
            options.of(**{field.name: value})
    assert options.of(seed=3.0).seed == 3


def test_length_penalties_do_not_overflow() -> None:
    with pytest.raises(UsageError, match="length_penalty is 1e\\+30; it has to be between -10 and 10"):
        Decoding(num_beams=2, length_penalty=1e30)
    prompts = [prompt(np.random.default_rng(0), 4)]
    for penalty in (-10, 10):
        found = generate(tiny_model(), prompts, [END], Decoding(6, num_beams=3, length_penalty=penalty))
        assert math.isfinite(found[0].score)


def test_learned_positions_have_an_end() -> None:
    model = tiny_model(positions="learned", max_position_embeddings=10)
    with pytest.raises(UsageError, match="more than the model's 10 positions"):
        generate(model, [prompt(np.random.default_rng(0), 6)], [END], Decoding(max_new_tokens=8))

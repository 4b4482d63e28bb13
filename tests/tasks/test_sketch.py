"""Sketch and edits: what is learned fits together, and what is written keeps the sketch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment

from openm6.core.batch import pad
from openm6.core.errors import UsageError
from openm6.core.sequence import IGNORE, SOURCE, SOURCE_BLOCKS, Sequence, SketchTarget
from openm6.core.tokenizer import Tokenizer
from openm6.inference.refine import refine
from openm6.model import M6
from openm6.model.cache import fill, prefill_all
from openm6.tasks import sketch
from openm6.tasks.encode import encode_prompt
from openm6.tasks.library import task_from_dict
from openm6.tasks.processor import Processor
from openm6.tasks.slots.table import split
from openm6.tasks.task import Task
from tests.conftest import tiny_config

words = st.lists(st.integers(0, 9), min_size=1, max_size=14)


def task(slot: str = "text") -> Task:
    return task_from_dict(
        {"name": "edit", "instructions": [f"前面 [{slot}:given] 整理。 -> [text:text]"], "sketch": "given"}
    )


@settings(deadline=None)
@given(words, words)
def test_what_is_the_sources_is_its_own_tokens_and_does_not_overlap(
    tokenizer: Tokenizer, source: list[int], text: list[int]
) -> None:
    given_, wanted = ("".join("红黄蓝绿色1234条袜"[n] for n in side) for side in (source, text))
    there = tokenizer.encode(given_)
    ids, runs = sketch.matched(there, wanted, tokenizer)
    assert tokenizer.decode(ids) == wanted
    taken: set[int] = set()
    end = 0
    for first, here, length in runs:
        assert there[first : first + length] == ids[here : here + length]
        assert here >= end and not taken & set(range(first, first + length))
        end = here + length
        taken |= set(range(first, first + length))


def test_values_are_found_whatever_stands_around_them(tokenizer: Tokenizer) -> None:
    """As a whole a text may have tokens that reach over the edges of what it has of the source; and a rare character is
    several tokens, of which none is lost."""
    assert any(len(tokenizer.encode(c)) > 1 for c in "囍") and "\ufffd" not in tokenizer.decode(tokenizer.encode("囍"))
    for source in ("红色", "囍字", "2 囍"):
        there = tokenizer.encode(source)
        for before in ("是红", "一条", ""):
            for after in ("的", "色的", "条纹"):
                ids, runs = sketch.matched(there, f"{before}，{source}{after}", tokenizer)
                assert tokenizer.decode(ids) == f"{before}，{source}{after}"
                assert source in "".join(tokenizer.decode(ids[here : here + n]) for _, here, n in runs)


@settings(deadline=None)
@given(st.lists(st.sampled_from("红黄囍1条"), min_size=1, max_size=8), st.data())
def test_what_is_kept_is_whole_characters(tokenizer: Tokenizer, source: list[str], data: st.DataObject) -> None:
    ids = [*tokenizer.encode("".join(source)), tokenizer.row_id]
    log_probs = np.array(data.draw(st.lists(st.permutations([-0.1, -1.0, -3.0]), min_size=len(ids), max_size=len(ids))))
    kept = sketch.kept(log_probs, ids, tokenizer)
    said = tokenizer.decode([i for piece in kept for i in piece])
    assert "\ufffd" not in said and tokenizer.row_id not in {i for piece in kept for i in piece}
    left = iter("".join(source))
    assert all(character in left for character in said)


@given(st.permutations(range(5)), st.integers(0, 2))
def test_pieces_come_in_their_likeliest_order(order: list[int], more: int) -> None:
    log_probs = np.full((5, 5 + more), -9.0)
    log_probs[order, range(5)] = -0.1
    assert sketch.ordered(log_probs) == list(order)


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_the_assignment_costs_as_little_as_scipys(rows: int, more: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 3, (rows, rows + more)) * 1.0 if ties else rng.normal(size=(rows, rows + more))
    columns = sketch.assign(cost)
    assert len(set(columns)) == rows
    assert cost[range(rows), columns].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum())


def test_of_a_cell_all_is_kept_or_nothing(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    prompt = encode_prompt(task("table"), {"given": {"品类": "连衣裙12", "数": "1234"}, "text": ""}, processor)
    assert isinstance(prompt.target, SketchTarget)
    source = prompt.ids[prompt.target.source.start : prompt.target.source.stop].tolist()
    _, value, _, other = sketch.cells(source, tokenizer)
    log_probs = np.tile(np.log([0.9, 0.05, 0.05]), (len(source), 1))
    log_probs[other.start] = np.log([0.45, 0.5, 0.05])  # one of them more likely than not, all of them less so
    log_probs[value.start : value.stop - 1] = np.log([0.1, 0.5, 0.4])
    assert [tokenizer.decode(piece) for piece in sketch.kept(log_probs, source, tokenizer)] == ["连衣裙12"]


@pytest.mark.parametrize("slot", ["text", "table"])
def test_every_kind_fits_its_text(processor: Processor, slot: str) -> None:
    tokenizer = processor.tokenizer
    value = "那个红色连衣裙12条" if slot == "text" else {"颜色": "红色", "品类": "连衣裙", "数": "12"}
    record = {"given": value, "text": "连衣裙红色，有12条。"}
    prompt = encode_prompt(task(slot), record, processor)
    assert isinstance(prompt.target, SketchTarget) and prompt.ids[-1] == tokenizer.answer_id
    source = prompt.ids[prompt.target.source.start : prompt.target.source.stop].tolist()
    text, _ = sketch.matched(source, record["text"], tokenizer)
    orders = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)

        def as_learned(kind: str, rng: np.random.Generator = rng) -> tuple[list[int], list[int], Sequence]:
            found = sketch.example(prompt, record["text"], tokenizer, rng, 99, kind)
            return found.ids[len(prompt) + 1 :].tolist(), found.labels[len(prompt) :].tolist(), found

        found = as_learned("order")[2]
        assert (found.labels[: len(prompt)] != IGNORE).sum() == len(prompt.target.source)
        numbers = [
            tokenizer.class_ids.index(i) for i in found.labels[prompt.target.source.start : prompt.target.source.stop]
        ]
        kept = sketch.kept(np.log(np.eye(3)[numbers] + 1e-9), source, tokenizer)
        assert {"红色", "连衣裙", "12"} <= {tokenizer.decode(piece).strip("条") for piece in kept}
        assert all("，" not in tokenizer.decode(piece) for piece in kept)

        draft, labels, _ = as_learned("order")
        mode = sketch.modes(tokenizer)["order"]
        pieces = [tokenizer.decode(piece) for piece in split([mode, *draft], mode)[1:]]
        places = [tokenizer.class_ids.index(i) for i in labels if i != IGNORE]
        assert len(places) == len([p for p in pieces if p]) and sorted(places) == list(range(len(places)))
        orders.add("".join(pieces[places.index(n)] for n in range(len(places))))

        draft, labels, _ = as_learned("insert")
        gaps = [tokenizer.class_ids.index(i) for i in labels]
        assert sum(gaps) + len(draft) == len(text)
        place = gaps[0]
        for token, gap in zip(draft, gaps[1:], strict=True):
            assert text[place] == token
            place += gap + 1

        draft, labels, _ = as_learned("fill")
        labels = labels[1:]
        assert [new if old == tokenizer.mask_id else old for old, new in zip(draft, labels, strict=True)] == text
        assert all((old == tokenizer.mask_id) == (new != IGNORE) for old, new in zip(draft, labels, strict=True))

        draft, labels, found = as_learned("delete")
        assert [t for t, bad in zip(draft, labels[1:], strict=True) if bad != tokenizer.yes_id] == text
        assert (found.blocks[: len(prompt) - 1] == SOURCE).all() and (found.blocks[len(prompt) :] == 1).all()
    assert any(said.startswith("连衣裙红色") for said in orders)


@pytest.fixture
def model(processor: Processor) -> M6:
    return M6(tiny_config(vocab_size=processor.tokenizer.vocab_size, initializer_range=0.3)).eval()


def test_what_is_written_keeps_the_sketch_and_does_not_depend_on_the_batch(model: M6, processor: Processor) -> None:
    texts = ["红色连衣裙", "一件蓝色的帽子12", "条纹", "左边有两件商品是什么颜色"]
    prompts = [encode_prompt(task(), {"given": text}, processor) for text in texts]
    together = refine(model, prompts, processor.tokenizer, 40)
    for prompt, found in zip(prompts, together, strict=True):
        assert refine(model, [prompt], processor.tokenizer, 40)[0].ids == found.ids
        assert len(found.ids) <= 40 and processor.tokenizer.mask_id not in found.ids
        assert all(i < processor.tokenizer.code_start for i in found.ids)
        hidden, _ = prefill_all(model, pad([prompt], 0), len(prompt))
        places = slice(prompt.target.source.start, prompt.target.source.stop)  # type: ignore[union-attr]
        classes = list(processor.tokenizer.class_ids[:3])
        log_probs = model.logits(hidden[0, places])[:, classes].log_softmax(-1).detach().numpy()
        kept = sketch.kept(log_probs, prompt.ids[places].tolist(), processor.tokenizer)
        left = Counter(found.ids)
        assert not Counter(token for piece in kept for token in piece) - left  # none is missing
        for piece in kept:
            after = iter(found.ids)
            assert all(token in after for token in piece)  # in order


@pytest.mark.parametrize("read", SOURCE_BLOCKS)
def test_drafts_of_other_lengths_are_asked_as_each_alone(model: M6, processor: Processor, read: str) -> None:
    import torch

    processor = replace(processor, source=read)
    prompts = [encode_prompt(task(), {"given": text}, processor) for text in ("红", "一件蓝色的帽子")]
    drafts = [[5, 6, 7, 8, 9], [11, 12]]
    width = torch.zeros(2, 5, dtype=torch.int64)
    for row, draft in enumerate(drafts):
        width[row, : len(draft)] = torch.tensor(draft)
    with torch.inference_mode():
        _, cache = prefill_all(model, pad(prompts, 0), max(map(len, prompts)) + 9)
        both = fill(model, width, cache, 0, torch.tensor([5, 2]))
        for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            _, alone = prefill_all(model, pad([prompt], 0), len(prompt) + 9)
            expected = fill(model, torch.tensor([draft]), alone, 0)
            torch.testing.assert_close(both[row, : len(draft)], expected[0], atol=1e-5, rtol=1e-4)
            whole = model(pad([sketch.draft_of(prompt, "insert", draft[1:], processor.tokenizer)], 0))
            again = fill(model, torch.tensor([[sketch.modes(processor.tokenizer)["insert"], *draft[1:]]]), alone, 0)
            torch.testing.assert_close(whole.hidden[0, len(prompt) :], again[0], atol=1e-5, rtol=1e-4)


def test_tasks_that_cannot_be_sketched_are_refused() -> None:
    for line, what in (
        ("[image:given] -> [text:t]", "text or table"), ("[text:given|drop=0.5] -> [text:t]", "given whole"),
        ("[text:given] -> [label:t]", "one text alone"), ("[text:given] -> 是[text:t]", "one text alone"),
        ("[text:other] -> [text:t]", "text or table"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=what):
            task_from_dict({"name": "x", "instructions": [line], "sketch": "given"})

"""Sketch and edits: what is learned fits together, and what is written keeps the sketch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from openm6.decode.refine import refine
from openm6.errors import UsageError
from openm6.model import M6
from openm6.sequence import IGNORE, SOURCE, pad
from openm6.tasks import sketch
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.tokenizer import Tokenizer
from tests.conftest import tiny_config

words = st.lists(st.integers(0, 9), min_size=1, max_size=14)


def task(slot: str = "text") -> Task:
    return Task.from_dict(
        {"name": "edit", "instructions": [f"前面 [{slot}:given] 整理。 -> [text:text]"], "sketch": "given"}
    )


def as_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return [i for c in text for i in tokenizer.encode(c)]


@settings(deadline=None)
@given(words, words)
def test_pieces_are_runs_of_both_and_do_not_overlap(tokenizer: Tokenizer, source: list[int], text: list[int]) -> None:
    given_, wanted = (as_ids("".join("红黄蓝绿色1234条"[n] for n in side), tokenizer) for side in (source, text))
    runs = sketch.pieces(given_, wanted, tokenizer)
    seen_there, seen_here, last = set(), set(), -1
    for there, here, length in runs:
        assert given_[there : there + length] == wanted[here : here + length]
        assert here > last
        last = here
        for n in range(length):
            assert there + n not in seen_there and here + n not in seen_here
            seen_there.add(there + n)
            seen_here.add(here + n)
    # One after the other they are the text's own tokens in their order.
    classes = [sketch.DROP] * len(given_)
    for number, (there, _, length) in enumerate(runs):
        classes[there : there + length] = [number] * length
    assert sketch.skeleton(classes, given_) == [wanted[i] for i in sorted(seen_here)]


@pytest.mark.parametrize("slot", ["text", "table"])
def test_every_kind_fits_its_text(processor: Processor, slot: str) -> None:
    tokenizer = processor.tokenizer
    value = "那个红色连衣裙12条" if slot == "text" else {"颜色": "红色", "品类": "连衣裙", "数": "12"}
    record = {"given": value, "text": "连衣裙红色，有12条。"}
    prompt = task(slot).encode(record, processor, with_target=False)
    assert prompt.sketch is not None and prompt.ids[-1] == tokenizer.answer_id
    source = prompt.ids[prompt.sketch.start : prompt.sketch.stop].tolist()
    text = tokenizer.encode(record["text"])
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = sketch.learned(prompt, text, tokenizer, rng, "sketch")
        assert (found.labels[prompt.sketch.start : prompt.sketch.stop] != IGNORE).all()
        assert (found.labels != IGNORE).sum() == len(prompt.sketch)
        numbers = [tokenizer.class_ids.index(i) for i in found.labels[prompt.sketch.start : prompt.sketch.stop]]
        kept = tokenizer.decode(sketch.skeleton(numbers, source))
        assert "连衣裙红色" in kept and "12" in kept and "，" not in kept

        found = sketch.learned(prompt, text, tokenizer, rng, "insert")
        draft, labels = found.ids[len(prompt) + 1 :].tolist(), found.labels[len(prompt) :].tolist()
        gaps = [tokenizer.class_ids.index(i) for i in labels]
        assert sum(gaps) + len(draft) == len(text)
        place = gaps[0]
        for token, gap in zip(draft, gaps[1:], strict=True):
            assert text[place] == token
            place += gap + 1

        found = sketch.learned(prompt, text, tokenizer, rng, "fill")
        draft, labels = found.ids[len(prompt) + 1 :].tolist(), found.labels[len(prompt) + 1 :].tolist()
        assert [new if old == tokenizer.mask_id else old for old, new in zip(draft, labels, strict=True)] == text
        assert all((old == tokenizer.mask_id) == (new != IGNORE) for old, new in zip(draft, labels, strict=True))

        found = sketch.learned(prompt, text, tokenizer, rng, "delete")
        draft, labels = found.ids[len(prompt) + 1 :].tolist(), found.labels[len(prompt) + 1 :].tolist()
        assert [t for t, bad in zip(draft, labels, strict=True) if bad != tokenizer.yes_id] == text
        assert (found.blocks[: len(prompt) - 1] == SOURCE).all() and (found.blocks[len(prompt) :] == 1).all()


@pytest.fixture
def model(processor: Processor) -> M6:
    return M6(tiny_config(vocab_size=processor.tokenizer.vocab_size, initializer_range=0.3)).eval()


def test_what_is_written_keeps_the_sketch_and_does_not_depend_on_the_batch(model: M6, processor: Processor) -> None:
    texts = ["红色连衣裙", "一件蓝色的帽子12", "条纹", "左边有两件商品是什么颜色"]
    prompts = [task().encode({"given": text}, processor, with_target=False) for text in texts]
    together = refine(model, prompts, processor.tokenizer, 40)
    for prompt, found in zip(prompts, together, strict=True):
        assert refine(model, [prompt], processor.tokenizer, 40)[0].ids == found.ids
        assert len(found.ids) <= 40 and processor.tokenizer.mask_id not in found.ids
        assert all(i < processor.tokenizer.code_start for i in found.ids)
        hidden, _ = model.prefill_all(pad([prompt], 0), len(prompt))
        places = slice(prompt.sketch.start, prompt.sketch.stop)  # type: ignore[union-attr]
        classes = list(processor.tokenizer.class_ids)
        numbers = model.logits(hidden[0, places])[:, classes].argmax(-1).tolist()
        kept = sketch.skeleton(numbers, prompt.ids[places].tolist())
        left = iter(found.ids)
        assert all(token in left for token in kept)  # in order, and none is missing


def test_drafts_of_other_lengths_are_asked_as_each_alone(model: M6, processor: Processor) -> None:
    import torch

    prompts = [task().encode({"given": text}, processor, with_target=False) for text in ("红", "一件蓝色的帽子")]
    drafts = [[5, 6, 7, 8, 9], [11, 12]]
    width = torch.zeros(2, 5, dtype=torch.int64)
    for row, draft in enumerate(drafts):
        width[row, : len(draft)] = torch.tensor(draft)
    with torch.inference_mode():
        _, cache = model.prefill_all(pad(prompts, 0), max(map(len, prompts)) + 9)
        both = model.fill(width, cache, 0, torch.tensor([5, 2]))
        for row, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            _, alone = model.prefill_all(pad([prompt], 0), len(prompt) + 9)
            expected = model.fill(torch.tensor([draft]), alone, 0)
            torch.testing.assert_close(both[row, : len(draft)], expected[0], atol=1e-5, rtol=1e-4)
            whole = model(pad([sketch.draft_of(prompt, "insert", draft[1:], processor.tokenizer)], 0))
            again = model.fill(torch.tensor([[sketch.modes(processor.tokenizer)["insert"], *draft[1:]]]), alone, 0)
            torch.testing.assert_close(whole.hidden[0, len(prompt) :], again[0], atol=1e-5, rtol=1e-4)


def test_tasks_that_cannot_be_sketched_are_refused() -> None:
    for line, what in (
        ("[image:given] -> [text:t]", "text or table"), ("[text:given|drop=0.5] -> [text:t]", "given whole"),
        ("[text:given] -> [label:t]", "one text alone"), ("[text:given] -> 是[text:t]", "one text alone"),
        ("[text:other] -> [text:t]", "text or table"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=what):
            Task.from_dict({"name": "x", "instructions": [line], "sketch": "given"})

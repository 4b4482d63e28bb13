"""Limits: whatever is written under them keeps them, however the tokenizer cuts words and numbers."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from openm6.core.errors import UsageError
from openm6.core.sequence import Banned, Sequence, TextTarget
from openm6.core.tokenizer import Tokenizer
from openm6.inference import Decoding
from openm6.inference.permitted import permitted
from openm6.inference.session import Session
from openm6.model import M6
from openm6.tasks.constraints import Limits, whole_sentences
from openm6.tasks.processor import Processor
from openm6.tasks.task import Task
from openm6.tasks.values import OwnValues, Values
from tests.conftest import tiny_config
from tests.tasks.conftest import processor, tokenizer  # noqa: F401

letters = "红黄蓝绿色条"


@pytest.fixture(scope="module")
def merged() -> Tokenizer:
    """One whose tokens are up to three characters."""
    texts = ["".join(random.Random(n).choices(letters, k=12)) + "价12元35元" for n in range(300)]
    return Tokenizer.train(texts, 420, num_codes=4, alphabet=letters + "价元，。", max_token_length=3)


def walked(limits: Limits, tokenizer: Tokenizer, rng: random.Random, longest: int = 40) -> tuple[str, bool]:  # noqa: F811
    """Any text that the limits let through, one favouring the dangerous; and whether it has ended."""
    ids: list[int] = []
    plain = [i for i in range(tokenizer.code_start) if not tokenizer.is_part(i) or tokenizer.decode([i]).isdigit()]
    favoured = [i for i in plain if any(c in letters + "0123456789" for c in tokenizer.decode([i]))]
    for _ in range(longest):
        found = limits.next(ids)
        if isinstance(found, Banned):
            pool = [i for i in (favoured if rng.random() < 0.8 else plain) if i not in found]
            if tokenizer.end_id not in found and rng.random() < 0.05:
                return tokenizer.decode(ids), True
            pool = pool or [i for i in plain if i not in found]
            assert pool
            ids.append(rng.choice(pool))
        else:
            assert found[0] == tokenizer.end_id
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(st.sampled_from(letters), min_size=1, max_size=4), max_size=4, unique=True),
    st.none() | st.sets(st.sampled_from(["12", "35", "123", "5", "120"]), min_size=1),
    st.integers(0, 6), st.integers(0, 30), st.randoms(),
)  # fmt: skip
def test_whatever_is_written_keeps_them(
    merged: Tokenizer, forbid: list[str], numbers: set[str] | None, least: int, most: int, rng: random.Random
) -> None:
    if (most and least > most) or len({c for word in forbid if len(word) == 1 for c in word}) == len(letters):
        return
    limits = Limits(merged, forbid, numbers, least, most)
    text, ended = walked(limits, merged, rng)
    assert not any(word in text for word in forbid)
    assert not most or len(text) <= most
    runs = re.findall(r"\d+", text)
    if numbers is not None:
        for run in runs if ended else runs[:-1]:
            assert run in numbers or (most and len(text) >= most and text.endswith(run))
    if ended:
        assert len(text) >= least


def test_near_its_end_a_text_goes_on_to_no_other_sentence_or_clause(merged: Tokenizer) -> None:
    limits, begun = (
        Limits(merged, least=2, most=24),
        "红黄蓝绿，红黄蓝绿",
    )  # ten of its characters are left behind five more
    end, [comma], [stop] = merged.end_id, merged.encode("，"), merged.encode("。")

    def likeliest(text: str, wanted: int, limits: Limits = limits) -> int:
        """The token that is written by a network that wants one, and a full stop less than any other."""
        logits = torch.zeros(1, merged.vocab_size)
        logits[0, wanted], logits[0, stop] = 9, -1
        prompt = Sequence(*[np.zeros(1, np.int32)] * 3, target=TextTarget(limits))
        return int(permitted(logits, [prompt], [merged.encode(text)], [Decoding()], end).argmax())

    assert likeliest(f"{begun}红黄蓝绿", comma) == comma
    for near in (f"{begun}红黄蓝绿色", f"{begun * 2}红黄蓝绿色"):
        assert likeliest(near, comma) == stop and likeliest(near, merged.encode("红")[0]) != stop
    assert likeliest(f"{begun}红黄蓝12", comma) == comma  # a number may have one inside
    for other in (Limits(merged, least=20, most=24), Limits(merged, ["。"], most=24), Limits(merged)):
        assert likeliest(f"{begun}红黄蓝绿色", comma, other) == comma

    def follows(text: str, limits: Limits = limits) -> Any:
        return limits.next(merged.encode(text))

    first, *others = follows(f"{begun}红黄蓝绿。")
    assert first == end and all(merged.decode([token]) in "”』」）)" for token in others)
    assert list(follows(f"{begun * 2}红黄蓝绿色条")) == [end]  # no room is left
    assert isinstance(follows(f"{begun}红黄蓝。"), Banned) and end not in follows(f"{begun}红黄蓝。")
    assert isinstance(follows(f"{begun}红黄蓝绿。", Limits(merged, least=20, most=24)), Banned)
    assert isinstance(follows("红黄蓝绿。" * 9, Limits(merged)), Banned)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("红色。蓝色！绿", "红色。蓝色！"), ("他说：“好。”然后", "他说：“好。”"), ("没有说完", ""), ("只要99.5", ""),
        ("", ""), ("一行。\n两行？三", "一行。\n两行？"),
    ],
)  # fmt: skip
def test_whole_sentences_are_what_comes_before_the_rest(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


@pytest.fixture(scope="module")
def priced() -> Tokenizer:
    """One whose tokens cut prices and colours anywhere; 折 is spelt in bytes."""
    texts = ["".join(random.Random(n).choices("1299,.，99万红色粉裙", k=14)) for n in range(400)]
    return Tokenizer.train(texts, 420, num_codes=4, alphabet="红粉酒白色裙万，。", max_token_length=4)


CELLS = {"1,299元": {"1299"}, "１．２万": {"1.2万", "12000"}, "8折": {"8折"}, "粉红": set(), "": set()}
"""What stands in a cell, and the numbers that a text may say of it."""

KNOWN = Values.load(closed=["白裙"])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(CELLS)), st.randoms())
def test_what_is_written_has_whole_numbers_and_own_colours(priced: Tokenizer, cell: str, rng: random.Random) -> None:
    limits = Limits(priced, [], [cell], values=OwnValues(KNOWN, [("颜色", cell)]))
    ids: list[int] = []
    words = [i for i in range(priced.code_start) if not priced.is_part(i) or priced.decode([i]) in set("0123456789,.")]
    words += [priced.class_ids[byte] for byte in "折酒".encode()]
    while not isinstance(found := limits.next(ids), Banned) or len(ids) < 30 or priced.end_id in found:
        pool = {*range(priced.code_start)}.difference(found) if isinstance(found, Banned) else {*found}
        ids.append(rng.choice(sorted(pool.intersection(words)) or sorted(pool)))
    text = priced.decode(ids)
    # A stop without a digit behind it ends a sentence, not a number: 12000.万 is 12000 and a word with 万.
    for number in re.findall(r"[0-9]+(?:\.[0-9]+)*[万折]?", re.sub("(?<=[0-9])[,，](?=299|000)", "", text)):
        assert number in CELLS[cell], text
    assert "白裙" not in text and ("粉色" not in text or cell == "粉红"), text
    assert not re.search("(?<!粉)红色(?!文化|旅游|革命|基因)", text), text


def test_what_is_broken_is_told(merged: Tokenizer) -> None:
    limits = Limits(merged, ["红色"], ["12"], 3, 6)
    assert limits.broken_by("一二三12") == ""
    assert limits.broken_by("红色的裙") == "says 红色"
    assert limits.broken_by("价13元") == "says 13, which is not given"
    assert limits.broken_by("价") == "has 1 characters, fewer than 3"
    assert limits.broken_by("一二三四五六七") == "has 7 characters, more than 6"
    for bad in ({"forbid": [" "]}, {"least": 5, "most": 4}):
        with pytest.raises(UsageError):
            Limits(merged, **bad)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"temperature": 1.0}])
def test_a_model_keeps_them(processor: Processor, decoding: dict) -> None:  # noqa: F811
    model = M6(tiny_config(vocab_size=processor.tokenizer.vocab_size, initializer_range=0.3)).eval()
    session = Session(model, processor)
    task = Task.from_instruction("[text:a] -> [text:b]")
    free = session.run(task, a="红色", decoding={"max_new_tokens": 12, **decoding})
    forbid = sorted({c for c in free if c.strip()})[:6] or ["红"]
    limits = Limits(processor.tokenizer, forbid, most=5)
    text = session.run(task, a="红色", decoding={"max_new_tokens": 12, **decoding}, limits=limits)
    assert len(text) <= 5 and not any(word in text for word in forbid)
    with pytest.raises(UsageError, match="has a form of its own"):
        session.run(Task.from_instruction("[text:a] -> [label:b|set=x,y]"), a="红", limits=limits)

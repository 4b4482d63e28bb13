"""What a corruption takes away is exactly what can be put back."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from openm6.tasks import corrupt

seeds = st.integers(0, 2**32)


@given(st.integers(0, 300), st.floats(0.01, 1), seeds)
def test_spans_have_the_share_and_lie_apart(length: int, share: float, seed: int) -> None:
    found = corrupt.spans(length, share, np.random.default_rng(seed))
    assert sum(stop - start for start, stop in found) == (max(1, round(share * length)) if length else 0)
    assert all(0 <= start < stop <= length for start, stop in found)
    assert all(a[1] < b[0] for a, b in pairwise(found))


@given(st.text(min_size=1, max_size=80), st.floats(0.01, 1), seeds)
def test_masked_text_is_the_text_without_its_spans(text: str, share: float, seed: int) -> None:
    pieces, whole = corrupt.mask(text, share, np.random.default_rng(seed))
    found = corrupt.spans(len(text), share, np.random.default_rng(seed))
    assert whole == text and len(pieces) == len(found) + 1
    gaps = [text[start:stop] for start, stop in found]
    assert "".join(piece + gap for piece, gap in zip(pieces, [*gaps, ""], strict=True)) == text


@given(st.text(min_size=1, max_size=40), seeds)
def test_prefix_and_rest_make_the_text(text: str, seed: int) -> None:
    (kept,), rest = corrupt.prefix(text, np.random.default_rng(seed))
    assert kept + rest == text and rest and (kept or len(text) == 1)


def test_span_lengths_are_of_poisson_3() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([stop - start for _ in range(200) for start, stop in corrupt.spans(2000, 0.15, rng)])
    drawn = np.maximum(np.random.default_rng(1).poisson(3, 100_000), 1)
    assert lengths.mean() == pytest.approx(drawn.mean(), abs=0.05)
    assert lengths.std() == pytest.approx(drawn.std(), abs=0.05)


def test_every_place_is_masked_alike() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(40)
    for _ in range(6000):
        for start, stop in corrupt.spans(40, 0.15, rng):
            hits[start:stop] += 1
    shares = hits[6:-6] / 6000
    assert hits.sum() / 6000 == 6 and abs(shares - shares.mean()).max() < 0.03


def test_gaps_are_read_as_people_write_them() -> None:
    assert corrupt.written_gaps("我喜欢____和<mask>。") == ("我喜欢", "和", "。")
    assert corrupt.written_gaps("\uff3f\uff3f你好") == ("", "你好")
    assert corrupt.written_gaps("snake_case __init__") == ("snake_case __init__",)


def test_a_texts_own_numbers_stay_the_same() -> None:
    one, two = corrupt.own_generator("红色"), corrupt.own_generator("红色")
    assert one.integers(1 << 30) == two.integers(1 << 30) != corrupt.own_generator("蓝色").integers(1 << 30)

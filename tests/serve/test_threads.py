"""How many threads a model gets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from openm6.inference.session import Session
from openm6.serve.calibrate import WORTH, fit_threads, worthwhile


@given(st.floats(0, 1), st.integers(1, 64))
def test_threads_are_taken_as_long_as_they_pay(parallel: float, most: int) -> None:
    """Amdahl: what part of the work threads share."""

    def seconds(threads: int) -> float:
        return 1 - parallel + parallel / threads

    found = worthwhile(seconds, most)
    assert 1 <= found <= most
    if found > 1:
        assert seconds(1) / seconds(found) >= WORTH
    if 2 * found <= most:
        assert seconds(found) / seconds(2 * found) < WORTH * (1 + 1e-9)


@pytest.mark.parametrize(("parallel", "found"), [(0.0, 1), (1.0, 6)])
def test_all_or_one(parallel: float, found: int) -> None:
    assert worthwhile(lambda threads: 1 - parallel + parallel / threads, 6) == found


def test_a_model_is_measured_and_answers_as_before(session: Session) -> None:
    before = torch.get_num_threads()
    try:
        assert 1 <= fit_threads(session.model) <= before
    finally:
        torch.set_num_threads(before)

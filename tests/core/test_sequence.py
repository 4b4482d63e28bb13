"""Packing, and the mask rule against its definition position by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from openm6.core.batch import allowed, count_pairs, pack, pad
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, SOURCE_BLOCKS, ImageTarget, Sequence
from tests.conftest import EXPERTS, example, tiny_model

shapes = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 6), st.lists(st.sampled_from([(1, 1), (1, 2), (2, 2)]), max_size=2)),
    min_size=1,
    max_size=7,
)


def examples(parts: list, read: str = "bidirectional") -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [example(rng, source, target, tuple(pictures), read=read) for source, target, pictures in parts]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=12))
def test_mask_is_the_written_rule(positions: list[tuple[int, int]]) -> None:
    segments = torch.tensor([[s for s, _ in positions]])
    blocks = torch.tensor([[b for _, b in positions]])
    mask = allowed(segments, blocks)[0]
    for q, (segment_q, block_q) in enumerate(positions):
        for k, (segment_k, block_k) in enumerate(positions):
            expected = segment_q == segment_k and (k <= q or (block_q == block_k and block_q >= 0))
            assert bool(mask[q, k]) == expected
    real = segments[0] > 0
    assert count_pairs(segments, blocks) == int(mask[real][:, real].sum())


@given(shapes, st.booleans())
def test_every_example_is_packed_once_and_unchanged(parts: list, even: bool) -> None:
    sequences = examples(parts)
    batch = pack(sequences, row_length=32, pad_id=0, balance_rows=even)
    assert batch.shape[1] <= 32
    for number, sequence in enumerate(sequences, 1):
        where = batch.segments == number
        assert where.any(1).sum() == 1, "an example lies in one row"
        assert batch.ids[where].tolist() == sequence.ids.tolist()
        assert batch.labels[where].tolist() == sequence.labels.tolist()
        assert batch.blocks[where].tolist() == sequence.blocks.tolist()
        assert batch.positions[where].tolist() == list(range(len(sequence)))
    padding = batch.segments == 0
    assert (batch.labels[padding] == IGNORE).all() and (batch.ids[padding] == 0).all()
    assert int((~padding).sum()) == sum(len(s) for s in sequences)


@given(shapes, st.booleans())
def test_patches_are_placed_where_the_sequence_says(parts: list, even: bool) -> None:
    sequences = examples(parts)
    batch = pack(sequences, row_length=32, pad_id=0, balance_rows=even)
    marked = torch.zeros(batch.ids.numel(), dtype=torch.int64)
    for group in batch.images:
        marked[group.places] += 1
    assert marked.max() <= 1
    for number, sequence in enumerate(sequences, 1):
        flags = marked.view(batch.ids.shape)[batch.segments == number]
        expected = np.zeros(len(sequence), int)
        for picture in sequence.pictures:
            expected[picture.start : picture.start + picture.patches] = 1
        assert flags.tolist() == expected.tolist()


@settings(deadline=None, max_examples=15)
@given(shapes, st.sampled_from([{}, {"positions": "learned"}, EXPERTS]), st.sampled_from([*SOURCE_BLOCKS]))
def test_loss_and_hidden_states_are_the_same_packed_or_not(parts: list, changes: dict, read: str) -> None:
    sequences = examples(parts, read)
    model = tiny_model(**changes)
    with torch.no_grad():
        packed, padded = pack(sequences, 32, 0), pad(sequences, 0)
        a, b = model(packed), model(padded)
        for number in range(1, len(sequences) + 1):
            x, y = a.hidden[packed.segments == number], b.hidden[padded.segments == number]
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-4, rtol=1e-5)


def test_rows_are_filled_first_fit_decreasing() -> None:
    rng = np.random.default_rng(0)
    batch = pack([example(rng, 0, n) for n in (5, 6, 4, 5)], row_length=10, pad_id=0)
    assert batch.shape == (2, 10)
    even = pack([example(rng, 0, n) for n in (5, 4, 4, 4, 3, 2)], row_length=12, pad_id=0, balance_rows=True)
    assert even.shape == (2, 11)


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="12 positions does not fit a row of 10"):
        pack([example(np.random.default_rng(0), 6, 6)], 10, 0)


def test_source_sees_both_ways_and_target_only_the_past() -> None:
    ids = np.arange(4, dtype=np.int32)
    blocks = np.array([SOURCE, SOURCE, CAUSAL, CAUSAL], np.int32)
    batch = pad([Sequence(ids, blocks, np.full(4, IGNORE, np.int32))], 0)
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert allowed(batch.segments, batch.blocks)[0].int().tolist() == expected


def test_codes_know_their_row_and_column() -> None:
    drawn = Sequence(*(np.zeros(9, np.int32),) * 3, target=ImageTarget(range(3, 7)))
    text = Sequence(*(np.zeros(4, np.int32),) * 3)
    batch = pack([text, drawn], 20, 0)
    places = (batch.segments[0] == 2).nonzero().squeeze(1)
    expected = [[-1, -1]] * 3 + [[0, 0], [0, 1], [1, 0], [1, 1]] + [[-1, -1]] * 2
    assert batch.cells[0, places].tolist() == expected
    assert (batch.cells[batch.segments != 2] == -1).all()
    assert pack([text], 20, 0).cells is None

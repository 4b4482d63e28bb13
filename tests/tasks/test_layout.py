"""Where everything stands in a Sequence, and what gives way when it is too long."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from openm6.core.errors import ContextLengthError, DataError
from openm6.core.images import ImageGrid
from openm6.core.sequence import CAUSAL, IGNORE, SOURCE, Sequence
from openm6.core.tokenizer import Tokenizer
from openm6.tasks import layout
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor


def lay_out(
    pieces: list[Piece], target: list[int] | None, processor: Processor, *more: Any, **options: Any
) -> Sequence:  # fmt: skip
    """After the mark of OpenM6's own form."""
    return layout.lay_out([*pieces, Piece((processor.tokenizer.answer_id,))], target, processor, *more, **options)


def limited(tokenizer: Tokenizer, length: int) -> Processor:
    return Processor(tokenizer, ImageGrid(8, 16), length)


def test_the_labels_are_the_target_one_place_ahead(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    found = lay_out([Piece([50, 51])], [60, 61, 62], processor, "t")
    assert found.ids.tolist() == [50, 51, tokenizer.answer_id, 60, 61, 62]
    assert found.labels.tolist() == [IGNORE, IGNORE, 60, 61, 62, tokenizer.end_id]
    assert found.blocks.tolist() == [SOURCE] * 2 + [CAUSAL] * 4
    assert found.ids.dtype == found.labels.dtype == found.blocks.dtype == np.int32 and found.task == "t"


def test_a_prompt_ends_where_the_answer_begins(processor: Processor) -> None:
    found = lay_out([Piece([50])], None, processor, "t")
    assert found.ids.tolist() == [50, processor.tokenizer.answer_id] and found.labels.tolist() == [IGNORE] * 2
    assert lay_out([], [60], processor, "t").ids.tolist() == [processor.tokenizer.answer_id, 60]


def test_pictures_know_where_their_patches_are(processor: Processor) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    image = [processor.tokenizer.image_id, *[processor.tokenizer.patch_id] * 4, processor.tokenizer.image_end_id]
    found = lay_out([Piece([50]), Piece(image, pixels), Piece(image, pixels)], [60], processor, "t")
    assert [(p.start, p.patches) for p in found.pictures] == [(2, 4), (8, 4)]
    for p in found.pictures:
        assert (found.ids[p.start : p.start + p.patches] == processor.tokenizer.patch_id).all()


sizes = st.integers(0, 40)


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=5), sizes, st.integers(1, 60))
def test_what_is_too_long_is_cut_at_its_end(tokenizer, parts: list, size: int, longest: int) -> None:
    pieces = [Piece([100 + i] * n, cuttable=cuttable) for i, (n, cuttable) in enumerate(parts)]
    target = list(range(200, 200 + size))
    fixed = 1 + sum(n for n, cuttable in parts if not cuttable)
    whole = fixed + sum(n for n, cuttable in parts if cuttable) + size
    if whole > longest and fixed >= longest:
        with pytest.raises(DataError, match=r"max_length"):
            lay_out(pieces, target, limited(tokenizer, longest), "t")
        return
    found = lay_out(pieces, target, limited(tokenizer, longest), "t")
    assert len(found) <= longest and (whole > longest or len(found) == whole) and found.truncated == whole - len(found)
    start = found.ids.tolist().index(tokenizer.answer_id)
    kept = [int((found.ids[:start] == 100 + i).sum()) for i in range(len(parts))]
    assert all(k == n or (cuttable and k < n) for k, (n, cuttable) in zip(kept, parts, strict=True))
    # The shortened ones are as long as each other, and nobody who was longer is shorter.
    cut = {k for k, (n, _) in zip(kept, parts, strict=True) if k < n}
    assert len(cut) <= 1 and all(k <= max(cut) for k, (_, c) in zip(kept, parts, strict=True) if cut and c)
    written = found.ids[start + 1 :].tolist()
    assert written == target[: len(written)]
    assert found.labels[start:].tolist() == [*target, tokenizer.end_id][: len(written) + 1]
    if len(written) < size:
        assert tokenizer.end_id not in found.labels and len(written) >= (longest - fixed) // 2


def test_a_prompt_leaves_room_for_its_answer(tokenizer: Tokenizer) -> None:
    pieces = [Piece([50] * 100, cuttable=True)]
    for truncate in ("end", "start"):
        assert len(lay_out(pieces, None, limited(tokenizer, 40), "t", reserve=10, truncate=truncate)) == 30
        assert len(lay_out(pieces, None, limited(tokenizer, 40), "t", reserve=1000, truncate=truncate)) in (20, 21)


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=5), sizes, st.integers(0, 5), st.integers(1, 60))
def test_at_the_start_the_longest_text_alone_loses_something(
    tokenizer, parts: list, reserve: int, least: int, longest: int
) -> None:
    pieces = [Piece(range(100 * i, 100 * i + n), cuttable=cuttable) for i, (n, cuttable) in enumerate(parts)]
    least = min(least, reserve)
    sized = max((n for n, cuttable in parts if cuttable), default=0)
    whole = 1 + sum(n for n, _ in parts)
    rest = whole - sized
    if whole + reserve > longest and rest + least + (sized > 0) > longest:
        with pytest.raises(ContextLengthError, match="max_length"):
            lay_out(pieces, None, limited(tokenizer, longest), "t", reserve, least, "start")
        return
    found = lay_out(pieces, None, limited(tokenizer, longest), "t", reserve, least, "start")
    assert len(found) + least <= longest and found.truncated == whole - len(found)
    assert found.truncated == 0 or whole + reserve > longest
    start = next((i for i, (n, cuttable) in enumerate(parts) if cuttable and n == sized), 0)
    kept = [
        list(piece.ids)[found.truncated :] if i == start and found.truncated else list(piece.ids)
        for i, piece in enumerate(pieces)
    ]
    assert found.ids.tolist() == [*(token for ids in kept for token in ids), tokenizer.answer_id]


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=5), st.integers(0, 5), st.integers(1, 60))
def test_without_a_word_nothing_is_cut(tokenizer, parts: list, least: int, longest: int) -> None:
    pieces = [Piece([100 + i] * n, cuttable=cuttable) for i, (n, cuttable) in enumerate(parts)]
    whole = 1 + sum(n for n, _ in parts)
    if whole + least > longest:
        with pytest.raises(ContextLengthError, match=f"has {whole} positions.* takes {longest} "):
            lay_out(pieces, None, limited(tokenizer, longest), "t", 10, least, None)
        return
    found = lay_out(pieces, None, limited(tokenizer, longest), "t", 10, least, None)
    assert len(found) == whole and not found.truncated

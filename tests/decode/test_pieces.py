"""Text in pieces is the text."""

from __future__ import annotations

from hypothesis import given, strategies as st

from openm6.decode.pieces import Pieces
from openm6.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["红色的靠垫，羊毛。", "a red cushion, 95 yuan", "绿色 wool"] * 5, 420, num_codes=4)


@given(st.lists(st.integers(0, TOKENIZER.code_start - 1), max_size=30))
def test_pieces_together_are_the_text(ids: list[int]) -> None:
    """Of any tokens, bytes of half a character among them."""
    pieces = Pieces(TOKENIZER)
    told = [pieces.add(token) for token in ids]
    assert "".join([*told, pieces.rest()]) == TOKENIZER.decode(ids)
    assert pieces.ids == ids


@given(st.text(alphabet="红色的靠垫羊毛ab é😀,。 1", max_size=30))
def test_a_character_is_told_whole(text: str) -> None:
    pieces = Pieces(TOKENIZER)
    told = [pieces.add(token) for token in TOKENIZER.encode(text)]
    assert "\ufffd" not in "".join(told)
    assert "".join([*told, pieces.rest()]) == TOKENIZER.decode(TOKENIZER.encode(text))

"""Text in pieces is the text."""

from __future__ import annotations

from hypothesis import given, strategies as st

from openm6.core.tokenizer import Tokenizer
from openm6.inference.pieces import Pieces, StopFilter, cut_at_stop
from tests.tasks.templates import ours

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


STOPS = st.lists(st.text(alphabet="红色ab, ", min_size=1, max_size=4), max_size=3)


@given(st.text(alphabet="红色ab, ", max_size=20), STOPS, st.integers(1, 4))
def test_pieces_end_before_the_first_stop(text: str, stops: list[str], size: int) -> None:
    """However the text is cut into pieces: a stop can lie in one piece or in several."""
    stopped = StopFilter(stops)
    told, read = "", ""
    for start in range(0, len(text), size):
        read += text[start : start + size]
        told += stopped.add(text[start : start + size])
        assert stopped.is_stopped == any(stop in read for stop in stops)
        if stopped.is_stopped:
            break
        assert read.startswith(told)
        held = read[len(told) :]  # no longer than it has to be
        assert not held or any(stop.startswith(held) for stop in stops)
    assert told + stopped.rest() == cut_at_stop(read, stops)
    assert not any(stop in told for stop in stops)


def test_what_may_be_the_beginning_of_a_stop_waits() -> None:
    stopped = StopFilter(["。。", "END"])
    assert [stopped.add(piece) for piece in ("红", "。", "色E", "N", "x", "。", "。多")] == [
        "红",
        "",
        "。色",
        "",
        "ENx",
        "",
        "",
    ]
    assert stopped.is_stopped and stopped.add("more") == "" and stopped.rest() == ""


def test_reasoning_comes_apart_from_the_answer() -> None:
    chat, tokenizer = ours("reasoning")
    for thought, answer in (("the cat sat", "on the mat"), ("今天天气很好", "好"), ("", "the dog")):
        pieces, thoughts, said = Pieces(tokenizer, chat), "", ""
        for token in tokenizer.encode(f"<think>\n{thought}\n</think>\n\n{answer}"):
            said += pieces.add(token)
            thoughts += pieces.thought
        assert (thoughts.strip(), said + pieces.rest()) == (thought, answer)

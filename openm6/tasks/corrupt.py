"""Corruptions of a source text, and the targets that restore it.

    mask=0.15   spans of characters are left out, a `<|mask|>` for each; the target is the whole text
    prefix      the text is cut in two; the source keeps the beginning, the target is the rest
    drop=0.1    the slot is left out altogether, once in ten (not implemented here)

A source of a recipe can have `noise` for all its input texts.

Spans are counted in characters, as in M6, where a Chinese character is a token (KDD 2021, section 4: about 15% masked;
lengths from Poisson(3) as in BART). So a gap written by a person ("我喜欢____。") equals a gap made in training."""

from __future__ import annotations

import re
import zlib

import numpy as np

MEAN_SPAN = 3.0

_WRITTEN_GAP = re.compile(r"_{3,}|\uff3f{2,}|<mask>")

Pieces = tuple[str, ...]
"""A text with gaps: one gap between consecutive pieces. One piece is a whole text."""


def mask(text: str, share: float, rng: np.random.Generator) -> tuple[Pieces, str]:
    """The text with a fraction `share` of its characters (at least one) in gaps, and the whole text."""
    pieces, last = [], 0
    for start, stop in spans(len(text), share, rng):
        pieces.append(text[last:start])
        last = stop
    return (*pieces, text[last:]), text


def prefix(text: str, rng: np.random.Generator) -> tuple[Pieces, str]:
    """The text cut at a random place: a beginning (of one character at least, where there are two), and the rest (never
    empty)."""
    cut = int(rng.integers(1, len(text))) if len(text) > 1 else 0
    return (text[:cut],), text[cut:]


def written_gaps(text: str) -> Pieces:
    """The text split at its written gaps: `____` (three or more), `＿＿` or `<mask>`."""
    return tuple(_WRITTEN_GAP.split(text))


def spans(length: int, share: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Disjoint (start, stop) of `round(share * length)` characters (at least 1), in order, never touching.

    Lengths are from Poisson(3), at least 1; the last is shortened to fit. Where there are too many to lie apart (a
    large share of a short text), they are joined to fewer."""
    if length == 0:
        return []
    left = max(1, round(share * length))
    kept = length - left
    lengths: list[int] = []
    while left:
        lengths.append(min(left, max(1, int(rng.poisson(MEAN_SPAN)))))
        left -= lengths[-1]
    while len(lengths) > kept + 1:
        last = lengths.pop()
        lengths[-1] += last
    # Between and around the `kept` characters are kept + 1 places; each takes at most one span.
    places = np.sort(rng.permutation(kept + 1)[: len(lengths)]).tolist()
    found, masked = [], 0
    for place, size in zip(places, lengths, strict=True):
        found.append((place + masked, place + masked + size))
        masked += size
    return found


def noised(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with about a fraction `share` of its characters deleted or replaced by another of its own (half of
    each): data augmentation for small data sets."""
    found = []
    for character in text:
        chance = rng.random()
        if chance >= share:
            found.append(character)
        elif chance < share / 2:
            found.append(text[int(rng.integers(len(text)))])
    return "".join(found) or text


def own_generator(text: str) -> np.random.Generator:
    """Random generator seeded by the text alone: a text has the same gaps each time it is measured."""
    return np.random.default_rng(zlib.crc32(text.encode("utf-8", "surrogatepass")))

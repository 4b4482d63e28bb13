"""A text corpus that is hard in a known way: many small languages, each a random chain of characters.

A line begins with the sign of its language; then each character follows from the one before it, by a table that belongs
to the language: four successors with the odds 8:4:2:1. A network has to hold all tables to reach the entropy of the
chains, so capacity pays; which table applies is settled by the first character, so there is something to specialize in.
Chains of the second order (two characters settle the next) were tried first: at a few hundred steps they measure how
soon attention finds the pair, not what a feed-forward can hold. Test lines are new draws from the same chains.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ODDS = np.array([8, 4, 2, 1]) / 15
ENTROPY = -float((ODDS * np.log(ODDS)).sum())
"""Nats a character that no network can get below, once the first is known."""

FIRST = ord("一")
SIGNS = [chr(ord("㐀") + n) for n in range(512)]


def write_corpus(
    folder: Path, languages: int, characters: int, lines: int, test_lines: int, length: int, seed: int
) -> dict[str, Path]:
    """train.jsonl and test.jsonl with `text`: `lines` lines of `length` characters, in `languages` languages over one
    alphabet of `characters`. The same for the same arguments."""
    rng = np.random.default_rng([seed, languages, characters])
    # Successors of each character, by language: [languages, characters, 4].
    tables = rng.integers(0, characters, (languages, characters, 4), dtype=np.int16)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, count in (("train", lines), ("test", test_lines)):
        draws = np.random.default_rng([seed, 1 + ("train", "test").index(split)])
        which = draws.integers(0, languages, count)
        text = np.empty((count, length), np.int16)
        text[:, 0] = draws.integers(0, characters, count)
        for place in range(1, length):
            step = draws.choice(4, count, p=ODDS)
            text[:, place] = tables[which, text[:, place - 1], step]
        files[split] = folder / f"{split}.jsonl"
        with files[split].open("w", encoding="utf-8") as file:
            for language, row in zip(which, text, strict=True):
                line = SIGNS[language] + "".join(chr(FIRST + c) for c in row)
                file.write(json.dumps({"text": line}, ensure_ascii=False) + "\n")
    return files

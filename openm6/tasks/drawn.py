"""A picture on the right side of an instruction: its codes, learned in order or by masks.

    in order       source <|answer|> <|image|> c1 c2 ... cn         labels: <|image|> c1 c2 ... cn <|end|>
    by masks       source <|answer|> <|image|> c1 ?  ... ?          labels: of the masked codes, at their own places
    with verdicts  source <|answer|> <|image|> c1 c2 ... cn r f q   labels: verdicts at r, f and q

Masked codes attend to each other in both directions (block 1), and the sequence ends with them. A picture with verdicts
is whole; its estimates belong to its block: whether it shows the prompt (relevance), looks real (fidelity; M6-UFC,
section 3.2), and pleases people (quality)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from openm6.core.errors import DataError, cut
from openm6.core.sequence import CAUSAL, IGNORE, Sequence
from openm6.core.tokenizer import Tokenizer

BLOCK = 1

ESTIMATES = ("relevance", "fidelity", "quality")
"""The estimates of a picture, in the order of the tokenizer's `estimate_ids`. A record may have verdicts of its own, in
columns `verdict_relevance` and so on: true or false, 1 or 0."""


def open_picture(sequence: Sequence, tokenizer: Tokenizer) -> Sequence:
    """Append `<|image|>` to a prompt: it then ends where codes begin."""
    return replace(
        sequence,
        ids=np.append(sequence.ids, tokenizer.image_id).astype(np.int32),
        blocks=np.append(sequence.blocks, CAUSAL).astype(np.int32),
        labels=np.append(sequence.labels, IGNORE).astype(np.int32),
    )


def mask_codes(
    sequence: Sequence, codes: np.ndarray, side: int, tokenizer: Tokenizer, rng: np.random.Generator
) -> Sequence:
    """Replace the codes [side * side] at the end of the sequence by masks, at random, and learn the masked ones."""
    count, masked = len(codes), draw_mask(side, rng).ravel()
    ids, blocks = sequence.ids.copy(), sequence.blocks.copy()
    labels = np.full_like(sequence.labels, IGNORE)
    ids[-count:][masked] = tokenizer.mask_id
    blocks[-count:] = BLOCK
    labels[-count:][masked] = codes[masked]
    return replace(sequence, ids=ids, blocks=blocks, labels=labels)


def verdicts_of(record: Mapping[str, Any]) -> dict[str, bool]:
    """The verdicts of a record. Raises DataError for a value that is neither true nor false."""
    found = {}
    for name in ESTIMATES:
        value = record.get(f"verdict_{name}")
        if value is None or value == "":
            continue
        if str(value).lower() not in _VERDICTS:
            raise DataError(f"verdict_{name} is {cut(value)!r}; a verdict on a picture is 1 or 0, true or false.")
        found[name] = _VERDICTS[str(value).lower()]
    return found


_VERDICTS = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False}


VERDICT_WEIGHT = 16.0
"""Weight of a verdict in the loss: a picture has one or two verdicts and many codes (with weight 1, relevance was not
learned)."""


def append_verdicts(sequence: Sequence, verdicts: Mapping[str, bool], tokenizer: Tokenizer) -> Sequence:
    """Append the estimates to a sequence that ends with the codes of a whole picture."""
    assert sequence.image is not None
    start = sequence.image.codes.start
    blocks = np.append(sequence.blocks, [BLOCK] * len(ESTIMATES)).astype(np.int32)
    blocks[start:] = BLOCK
    labels = np.full(len(blocks), IGNORE, np.int32)
    for place, name in enumerate(ESTIMATES, start=len(sequence)):
        if name in verdicts:
            labels[place] = tokenizer.yes_id if verdicts[name] else tokenizer.no_id
    ids = np.append(sequence.ids, tokenizer.estimate_ids).astype(np.int32)
    target = replace(sequence.image, weight=VERDICT_WEIGHT)
    return replace(sequence, ids=ids, blocks=blocks, labels=labels, target=target)


def draw_mask(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask of a picture's codes, bool [side, side], True for at least one: at random places (their fraction by
    the cosine schedule of decoding), all, those inside a box, or those outside (M6-UFC, section 3.1)."""
    kind = rng.choice(4, p=[0.55, 0.15, 0.15, 0.15])
    if kind == 0:
        count = max(1, round(math.cos(math.pi / 2 * rng.random()) * side * side))
        return (rng.permutation(side * side) < count).reshape(side, side)
    if kind == 1 or side == 1:
        return np.ones((side, side), bool)
    height, width = rng.integers(1, side, 2)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    inside = np.zeros((side, side), bool)
    inside[top : top + height, left : left + width] = True
    return inside if kind == 2 else ~inside

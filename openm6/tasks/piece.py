"""Piece: a stretch of an example, before it is laid out as a Sequence."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """A stretch of the source: `ids`, and the `pixels` [H, W, 3] whose patches are the ids between its first and its
    last (or features of these patches). A `cuttable` one may be shortened when the example is too long; a `learned`
    one, an answer of an earlier turn, is predicted.

    text    what the ids say, where a chat template encodes them with their neighbours: `ids` is then empty"""

    ids: Items[int]
    pixels: np.ndarray | None = None
    cuttable: bool = False
    text: str | None = None
    learned: bool = False

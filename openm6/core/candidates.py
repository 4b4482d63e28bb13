"""A candidate: one picture generated for a prompt, as the SDK and the client return it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generated picture, the `number`-th for its prompt, its codes int64 [side * side], the model's `estimates`
    (log-odds of relevance, fidelity and quality), and the score that ranks it.

    `seed` generates this picture again, alone; `image.info["openm6"]` is JSON of the other settings that this takes.
    `uncertain`: the model, which reads the picture, is unlikely to write the prompt (where it can read; see rank.py).
    """

    image: Image.Image
    number: int
    codes: np.ndarray
    estimates: dict[str, float]
    score: float
    seed: int = 0
    uncertain: bool = False


def candidates_of(candidates: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    """Candidates from a server's JSON, with images in base64. Fields of newer servers are ignored."""
    names = {field.name for field in fields(Candidate)}
    found = []
    for candidate in candidates:
        values = {name: value for name, value in candidate.items() if name in names}
        values |= {"image": image_of(values["image"]), "codes": np.asarray(values["codes"], np.int64)}
        found.append(Candidate(**values))
    return found


def image_of(text: str) -> Image.Image:
    """An RGB picture from its file in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")

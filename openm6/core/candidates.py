"""A candidate: one picture that a model drew for a wish, as the SDK and the client give it."""

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
    """A drawn picture, the `number`-th of its wish, its codes int64 [side * side], and what the model thinks of it:
    log-odds of relevance, fidelity and quality, and the score that ranks.

    `seed` draws this picture again, alone; `image.info["openm6"]` is JSON that says what else that takes. `uncertain`:
    the model, which reads the picture, would hardly write what was asked for (where it can read; see rank.py).
    """

    image: Image.Image
    number: int
    codes: np.ndarray
    estimates: dict[str, float]
    score: float
    seed: int = 0
    uncertain: bool = False


def candidates_of(candidates: Iterable[Mapping[str, Any]]) -> list[Candidate]:
    """Candidates out of a server's JSON, with images in base64. Fields that only a newer server knows are ignored."""
    names = {field.name for field in fields(Candidate)}
    found = []
    for candidate in candidates:
        told = {name: value for name, value in candidate.items() if name in names}
        told |= {"image": image_of(told["image"]), "codes": np.asarray(told["codes"], np.int64)}
        found.append(Candidate(**told))
    return found


def image_of(text: str) -> Image.Image:
    """A picture's file in base64 as RGB."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")

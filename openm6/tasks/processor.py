"""What a task needs of a model to turn a record into a Sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from openm6.tasks.pictures import PictureCodec


@dataclass(frozen=True)
class Processor:
    """The model's tokenizer, its grid of picture patches, the longest example in positions, the codec of a model that
    draws, the positions before every example that an adapter fills, and the ids that the model has met in training
    (None: nobody wrote them down)."""

    tokenizer: Tokenizer
    grid: ImageGrid
    max_length: int
    codec: PictureCodec | None = None
    prompt: int = 0
    taught: frozenset[int] | None = None

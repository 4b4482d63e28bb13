"""The properties of a model that tasks need to turn a record into a Sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openm6.core.images import ImageGrid
from openm6.core.tokenizer import Tokenizer
from openm6.tasks.chat import ChatFormat

if TYPE_CHECKING:
    from openm6.tasks.pictures import PictureCodec


@dataclass(frozen=True)
class Processor:
    """Tokenizer and limits of a model.

    tokenizer    the model's tokenizer
    grid         the grid of picture patches
    max_length   maximum length of an example, in positions
    codec        the image codec of a model that draws
    prompt       number of positions before every example that an adapter fills
    seen_tokens  ids that the model has met in training; None: unknown
    source       how the model reads a source: a key of SOURCE_BLOCKS
    chat         how an imported model is asked: by its chat template; None: in OpenM6's own form
    origin       name and licence of the checkpoint that the weights began with; None: they began at random
    checkpoint   keys of that checkpoint's configurations that an export writes again (weights/checkpoint.py)"""

    tokenizer: Tokenizer
    grid: ImageGrid
    max_length: int
    codec: PictureCodec | None = None
    prompt: int = 0
    seen_tokens: frozenset[int] | None = None
    source: str = "bidirectional"
    origin: dict[str, str] | None = None
    chat: ChatFormat | None = None
    checkpoint: dict[str, Any] | None = None

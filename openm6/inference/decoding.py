"""Decoding options, generated texts, and the room that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeVar

import torch

from openm6.core.errors import ContextLengthError, UsageError, cut, suggest
from openm6.model import M6
from openm6.model.precision import fast_dtype

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decoding:
    """Options of text generation.

    max_new_tokens         maximum number of tokens of the answer
    temperature            0 takes the most probable token (greedy); above 0 samples
    top_k, top_p           sample from the k most probable tokens, or from the nucleus of probability p
    num_beams              width of beam search (with temperature 0); 1 does not search
    length_penalty         a beam's score is its log-probability / length ** length_penalty
    repetition_penalty     above 1 makes tokens that the answer already has less probable: positive logits are divided
                           by it, negative ones multiplied. Tokens of the prompt alone are not penalized, because
                           answers repeat what they were given
    no_repeat_ngram_size   size of n-grams that an answer never repeats; 0: no restriction
    seed                   random seed; row i of a call samples by seed and i
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self, max_new_tokens=(1, 2**31), temperature=(0, 100), top_k=(0, 2**31), top_p=(1e-9, 1),
            num_beams=(1, 2**31), length_penalty=(-10, 10), repetition_penalty=(0.01, 100),
            no_repeat_ngram_size=(0, 2**31), seed=(-(2**63), 2**64),
        )  # fmt: skip
        if self.num_beams > 1 and self.temperature > 0:
            raise UsageError(
                "num_beams and temperature exclude each other: beam search does not sample.", param="num_beams"
            )

    @classmethod
    def of(cls, **values: Any) -> Decoding:
        """Options from keywords, such as a task's defaults and a user's. Raises UsageError for an unknown one."""
        return options(cls, values)


def options(cls: type[T], values: Mapping[str, Any]) -> T:
    """Create a dataclass of options from keywords. Raises UsageError for an unknown one."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UsageError(f"{cls.__name__} has no option {cut(key)}.{suggest(key, known)}", param=cut(key))
    return cls(**values)


def check_ranges(options: Any, **ranges: tuple[float, float]) -> None:
    """Raises UsageError for the first option that is not a number (an integer, where the default is one) in its range.
    Integral floats become integers."""
    for name, (low, high) in ranges.items():
        value, whole = getattr(options, name), isinstance(type(options).__dataclass_fields__[name].default, int)
        is_number = isinstance(value, Real)
        if not is_number or (whole and value != value // 1):
            raise UsageError(f"{name} is {value!r}; it has to be a {'whole ' * whole}number.", param=name)
        if not low <= value <= high:
            raise UsageError(f"{name} is {value}; it has to be between {low:g} and {high:g}.", param=name)
        if whole:
            object.__setattr__(options, name, int(value))


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated text.

    ids        token ids, without the end token
    score      sum of the log-probabilities of all tokens, the end token included, among the permitted tokens
    finished   whether the end token came before max_new_tokens
    """

    ids: list[int]
    score: float
    finished: bool


def check_room(model: M6, prompt: int, new: int) -> None:
    """Raises ContextLengthError for more positions than a model with learned positions has. Rotary positions have no
    such limit."""
    limit = model.config.max_position_embeddings
    if model.place is not None and prompt + new > limit:
        raise ContextLengthError(
            f"A prompt of {prompt} positions and {new} new tokens are more than the model's {limit} positions: "
            "shorten the input or lower max_new_tokens."
        )


def kv_bytes(model: M6, rows: int, positions: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the keys and values of a cache of [rows, positions], in `dtype` (by default the fastest of the
    device)."""
    config, device = model.config, model.embed.weight.device
    size = 4 if device.type == "cpu" else (dtype or fast_dtype(device.type)).itemsize  # as KVCache stores them
    return rows * positions * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size

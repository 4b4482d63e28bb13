"""How a text is decoded, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeVar

from openm6.core.errors import ContextLengthError, UsageError, cut, suggest
from openm6.model import M6

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode.

    max_new_tokens   stop there at the latest
    temperature      0 takes the likeliest token (greedy); above 0 samples
    top_k, top_p     sample among the k likeliest, or the likeliest that together have probability p
    num_beams        beam search of that width (with temperature 0)
    length_penalty   a beam's score is its log-probability / length ** penalty
    repetition_penalty     above 1 makes tokens that the answer has already less likely: their logits are divided by it
                           where positive, multiplied where negative. Those of the prompt alone are not penalized: an
                           answer says again what it was given
    no_repeat_ngram_size   no run of so many tokens occurs twice in an answer; 0: any may
    seed             of the random numbers; row i of a call draws from seed and i
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
        """From keywords, e.g. a task's defaults and a user's wishes; an unknown one is a UsageError."""
        return options(cls, values)


def options(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of options from keywords."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UsageError(f"{cls.__name__} has no option {cut(key)}.{suggest(key, known)}", param=cut(key))
    return cls(**values)


def check_ranges(options: Any, **ranges: tuple[float, float]) -> None:
    """UsageError for the first option that is no number (of one whose default is a whole number, no whole one), or out
    of its range."""
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
    """ids without the end token; `score`, the sum of the log-probabilities of all tokens taken (the end too), among
    those that were permitted;
    `finished`, whether the end token came before max_new_tokens."""

    ids: list[int]
    score: float
    finished: bool


def check_room(model: M6, prompt: int, new: int) -> None:
    """Refuse what learned positions have no place for (rotary positions have no such limit)."""
    limit = model.config.max_position_embeddings
    if model.place is not None and prompt + new > limit:
        raise ContextLengthError(
            f"A prompt of {prompt} positions and {new} new tokens are more than the model's {limit} positions: "
            "shorten the input or lower max_new_tokens."
        )

"""A box in a picture: left, top, right and bottom in hundredths of the picture's width and height, two digits each.

The last hundredth is written 99, so that a box always has eight digits."""

from collections.abc import Sequence
from typing import Any

from openm6.core.errors import DataError
from openm6.tasks.piece import Piece
from openm6.tasks.processor import Processor
from openm6.tasks.slots.text import from_json, spoken

DIGITS = 8
_FORM = "has to be a box: [left, top, right, bottom] as fractions of the picture from 0 to 1."


def schema() -> dict[str, Any]:
    """Left, top, right, bottom as fractions of the picture's width and height."""
    return {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 4, "maxItems": 4}


def source(value: Any, processor: Processor) -> Piece:
    return spoken(_digits(value), processor)


def target(value: Any, processor: Processor) -> Sequence[int]:
    """Encode four fractions, or JSON of them."""
    return processor.tokenizer.encode(_digits(value))


def _digits(value: Any) -> str:
    return "".join(f"{min(99, round(100 * place)):02d}" for place in as_box(value))


def read(ids: Sequence[int], processor: Processor) -> list[float]:
    """The four fractions; missing digits are 0."""
    digits = "".join(c for c in processor.tokenizer.decode(ids) if c.isascii() and c.isdigit())[:DIGITS]
    digits = digits.ljust(DIGITS, "0")
    return [int(digits[i : i + 2]) / 100 for i in range(0, DIGITS, 2)]


def as_box(value: Any) -> list[float]:
    """A box as four fractions. Raises DataError for an invalid one."""
    value = from_json(value, _FORM)
    numbers = isinstance(value, (list, tuple)) and len(value) == 4
    if not numbers or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value):
        raise DataError(_FORM)
    left, top, right, bottom = (float(v) for v in value)
    if left >= right or top >= bottom:
        raise DataError(
            f"is no box: left {left:g} and top {top:g} have to be below right {right:g}, bottom {bottom:g}."
        )
    return [left, top, right, bottom]

"""Limits on the length of a request's texts, checked before any other work.

Normalizing and tokenizing take time and memory by the character: a text that cannot fit into the model is refused by
its length alone. The server applies the same check before a request reaches the model's process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openm6.core.errors import ContextLengthError, DataError, UsageError, cut, suggest

CHARACTERS = 32
"""Maximum characters of a value for each position of the model. Tokens trained here have at most 8 characters
(Tokenizer.train); in larger vocabularies some have more (runs of blanks, names of code), but no text has 32 a token on
average."""

TRUNCATE = ("start",)
"""Ways to truncate a prompt that is too long for the model."""


def check_truncate(truncate: str | None) -> None:
    """Raises UsageError for a value other than None and those of TRUNCATE."""
    if truncate is not None and truncate not in TRUNCATE:
        raise UsageError(
            f'truncate is "{cut(truncate)}"; it is "start" (the beginning of the longest text is left out) or None '
            f"(what is too long is refused).{suggest(cut(truncate), TRUNCATE)}",
            param="truncate",
        )


def check_value(value: Any, positions: int | None) -> None:
    """Check all texts in a value, through lists and mappings, in time that does not depend on its size.

    Raises ContextLengthError for more than CHARACTERS characters a position (elements and digits count as characters;
    None: no limit), DataError for a lone surrogate."""
    most = None if positions is None else CHARACTERS * positions
    count, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (str, list, tuple, Mapping)):
            count += len(one)
        else:
            count += one.bit_length() // 3 if isinstance(one, int) else 1  # digits, about
        if most is not None and count > most:
            size = f"{len(value):,} characters" if isinstance(value, str) else f"more than {most:,} characters"
            raise ContextLengthError(
                f"has {size}; a model of {positions:,} positions takes {most:,} at most ({CHARACTERS} a position)."
            )
        if isinstance(one, str):
            _check_whole(one)
        elif isinstance(one, Mapping):
            waiting += (*one.keys(), *one.values())
        elif isinstance(one, (list, tuple)):
            waiting += one


def _check_whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"is no text: character {error.start + 1} is half of a surrogate pair (such as \\ud83d)."
        ) from None

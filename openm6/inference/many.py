"""Many records, answered group by group, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from openm6.core.errors import DataError, UsageError, suggest

R = TypeVar("R")
P = TypeVar("P")

ON_ERROR = ("raise", "return")


def answer_groups(
    records: Iterable[R],
    size: int,
    prepare: Callable[[R, int], P],
    answer: Callable[[list[P]], Iterable[Any]],
    on_error: str = "raise",
) -> Iterator[Any]:
    """An answer for each record; `size` records are read at a time.

    `prepare` makes a prompt of a record and its index in the call (0, 1, ...), which does not depend on `size`;
    `answer` gets the prompts of a group. A DataError of `prepare` ends the call, or with `on_error="return"` takes the
    place of that record's answer.
    """
    if on_error not in ON_ERROR:
        raise UsageError(f'on_error is "{on_error}"; it is "raise" or "return".{suggest(str(on_error), ON_ERROR)}')
    numbered = enumerate(records)
    while group := list(islice(numbered, size)):
        found: list[Any] = [None] * len(group)
        prompts: dict[int, P] = {}
        for place, (number, record) in enumerate(group):
            try:
                prompts[place] = prepare(record, number)
            except DataError as error:
                if on_error == "raise":
                    raise
                found[place] = error
        answers = answer(list(prompts.values())) if prompts else ()
        for place, value in zip(prompts, answers, strict=True):
            found[place] = value
        yield from found

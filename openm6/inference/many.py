"""Many records, answered group by group, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from openm6.core.errors import DataError, UsageError, suggest

R = TypeVar("R")
P = TypeVar("P")

ON_ERROR = ("raise", "return")


def answer_groups(
    records: Iterable[R],
    size: int,
    prepare: Callable[[R], P],
    answer: Callable[[list[P], list[int]], Iterable[Any]],
    on_error: str = "raise",
) -> Iterator[Any]:
    """An answer for each record; `size` records are read at a time.

    `prepare` makes a prompt of one record. `answer` gets the prompts of a group with the numbers of their records in
    the call (0, 1, ...), which do not depend on `size`: random numbers are drawn by them. A DataError that `prepare`
    raises ends the call, or with `on_error="return"` stands in the place of that record's answer.
    """
    if on_error not in ON_ERROR:
        raise UsageError(f'on_error is "{on_error}"; it is "raise" or "return".{suggest(str(on_error), ON_ERROR)}')
    for first, group in groups(records, size):
        found: list[Any] = [None] * len(group)
        prompts: dict[int, P] = {}
        for place, record in enumerate(group):
            try:
                prompts[place] = prepare(record)
            except DataError as error:
                if on_error == "raise":
                    raise
                found[place] = error
        answers = answer(list(prompts.values()), [first + place for place in prompts]) if prompts else ()
        for place, value in zip(prompts, answers, strict=True):
            found[place] = value
        yield from found


def groups(records: Iterable[R], size: int) -> Iterator[tuple[int, list[R]]]:
    """Up to `size` records at a time, and the number of the first of them."""
    first, group = 0, list[R]()
    for record in records:
        group.append(record)
        if len(group) == size:
            yield first, group
            first, group = first + size, []
    if group:
        yield first, group

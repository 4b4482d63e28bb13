"""Work in steps: a generator that yields after each pass of the network, so that other work can run in between, and
returns its result. The caller enters the precision (`Session.precision`) for every step.

A step yields its cost: for every row (a prompt, a request) the number of tokens that the network computed for it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence as Items
from contextlib import AbstractContextManager
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec, TypeAlias, TypeVar

from openm6.core.batch import by_length
from openm6.core.errors import DataError, UsageError, suggest
from openm6.core.sequence import Sequence

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Costs: TypeAlias = list[int]
Steps: TypeAlias = Generator[Costs, None, T]


def complete(steps: Callable[P, Steps[T]]) -> Callable[P, T]:
    """The function that runs all steps and returns their result."""

    @wraps(steps)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return finish(steps(*args, **kwargs))

    return run


def finish(steps: Steps[T]) -> T:
    """Run all steps; their result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def map_costs(steps: Steps[T], change: Callable[[Costs], Costs]) -> Steps[T]:
    """The same steps, with costs of the caller's rows: `change` computes them from those of the steps' rows."""
    while True:
        try:
            costs = next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        yield change(costs)


def in_batches(
    prompts: Items[Sequence], batch_size: int, batch_steps: Callable[[list[int]], Steps[list[T]]]
) -> Steps[list[T]]:
    """Work on prompts in batches of similar length, so that little is padded; results in the prompts' order.

    `batch_steps` gets the indices of a batch's prompts. A row costs nothing while another batch is computed.
    """
    found: dict[int, T] = {}
    for chosen in by_length(prompts, batch_size):

        def spread(costs: Costs, chosen: list[int] = chosen) -> Costs:
            by_index = dict(zip(chosen, costs, strict=True))
            return [by_index.get(i, 0) for i in range(len(prompts))]

        results = yield from map_costs(batch_steps(chosen), spread)
        found |= dict(zip(chosen, results, strict=True))
    return [found[i] for i in range(len(prompts))]


def in_context(enter: Callable[[], AbstractContextManager[Any]], items: Iterator[T]) -> Iterator[T]:
    """The items, each computed inside a context of its own. The caller's code between two items runs outside of it,
    and a context that the caller enters there does not reach the next item."""
    while True:
        with enter():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def in_groups(
    records: Iterable[R], size: int, prepare: Callable[[R, int], T], answer: Callable[[list[T]], list[Any]],
    on_error: str,
) -> Iterator[Any]:  # fmt: skip
    """An answer for each record; `size` records are read at a time.

    `prepare` makes a prompt of a record and its index in the call (0, 1, ...), which does not depend on `size`;
    `answer` gets the prompts of a group. A DataError of `prepare` ends the call, or with `on_error="return"` takes the
    place of that record's answer.
    """
    if on_error not in ("raise", "return"):
        known = suggest(str(on_error), ("raise", "return"))
        raise UsageError(f'on_error is "{on_error}"; it is "raise" or "return".{known}')
    numbered = enumerate(records)
    while group := list(islice(numbered, size)):
        found: list[Any] = [None] * len(group)
        prompts: dict[int, T] = {}
        for place, (number, record) in enumerate(group):
            try:
                prompts[place] = prepare(record, number)
            except DataError as error:
                if on_error == "raise":
                    raise
                found[place] = error
        for place, value in zip(prompts, answer(list(prompts.values())) if prompts else (), strict=True):
            found[place] = value
        yield from found

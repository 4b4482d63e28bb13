"""Work in steps: a generator that yields after each pass of the network, so that other work can run in between, and
returns its result. The caller enters the precision (`Session.precision`) for every step.

A step yields its cost: for every row (a prompt, a request) the number of tokens that the network computed for it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence as Items
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

from openm6.core.batch import by_length
from openm6.core.sequence import Sequence

P = ParamSpec("P")
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

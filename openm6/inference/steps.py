"""Work in steps: a generator that stops after each pass of the network, so that other work can go between, and returns
what it has made. Whoever advances it sees to the precision (`Session.precision`) at every step.

Each step yields its cost: for every row (a prompt, a record), how many tokens the network computed for it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Counts: TypeAlias = list[int]
Steps: TypeAlias = Generator[Counts, None, T]


def whole(steps: Callable[P, Steps[T]]) -> Callable[P, T]:
    """The function that takes all steps at once."""

    @wraps(steps)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return finish(steps(*args, **kwargs))

    return run


def finish(steps: Steps[T]) -> T:
    """What is made, after all steps."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def recounted(steps: Steps[T], change: Callable[[Counts], Counts]) -> Steps[T]:
    """The same steps; `change` turns the costs of their rows into those of the caller's rows."""
    while True:
        try:
            counts = next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        yield change(counts)


def each_inside(enter: Callable[[], AbstractContextManager[Any]], items: Iterator[T]) -> Iterator[T]:
    """The items, each made inside a context of its own. What the caller does between two items happens outside of it,
    and what another caller has set meanwhile does not reach the next item."""
    while True:
        with enter():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item

"""Extensions by users: slot types, heads with losses of their own, metrics.

    register_slot("money", my_module)          a slot type (tasks/slots)
    register_head("depth", Depth())            answers by a linear layer and a loss of your own (tasks/heads.py)
    register_metric("close", close)            a metric (tasks/metrics.py)

`openm6 --extension mine.py ...` runs such a file before any command. No other file is run: a model or a recipe from
elsewhere cannot name one."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterable
from pathlib import Path

from openm6.core.environment import EXTENSIONS
from openm6.core.errors import UsageError
from openm6.tasks.grammar import ATTRIBUTES
from openm6.tasks.heads import Head, register_head
from openm6.tasks.metrics import BUILT_IN, ELSEWHERE, LOWER_IS_BETTER, METRICS, Metric, Values
from openm6.tasks.slots import TYPES, SlotType

__all__ = [
    "Head",
    "Values",
    "load_extension",
    "load_named_extensions",
    "register_head",
    "register_metric",
    "register_slot",
]


def register_slot(name: str, kind: SlotType, attributes: Iterable[str] = ("drop",)) -> None:
    """Make `name` a slot type. Raises UsageError for a name that is taken."""
    if not name.isidentifier() or name in TYPES:
        raise UsageError(f"{name!r} cannot name a slot type: it is no name, or taken.")
    TYPES[name] = kind
    ATTRIBUTES[name] = frozenset(attributes)


def register_metric(name: str, metric: Metric, lower_is_better: bool = False) -> None:
    """Make `name` a metric: a function of answers and, for each, its references, as texts, that returns one number for
    all of them, a number for each, or Values. `lower_is_better` tells early stopping and compression to prefer lower
    values, as of an error. Raises UsageError for the name of a metric of OpenM6."""
    if name in BUILT_IN or name in ELSEWHERE:
        raise UsageError(f"{name!r} cannot name a metric of yours: OpenM6 has a metric of that name.")
    METRICS[name] = metric
    (LOWER_IS_BETTER.add if lower_is_better else LOWER_IS_BETTER.discard)(name)


def load_named_extensions() -> None:
    """Run the extensions named in the environment, in a further process of a command."""
    for path in filter(None, os.environ.get(EXTENSIONS, "").split(os.pathsep)):
        load_extension(path)


def load_extension(path: str | Path) -> None:
    """Run a Python file of the user, which registers its extensions."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"The extension {path} is not there.")
    runpy.run_path(str(path), run_name=path.stem)

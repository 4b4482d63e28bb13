"""The table of answer kinds. A new kind is a file with its Mode, and an entry here."""

from __future__ import annotations

from openm6.inference.ends import HEAD, VECTOR
from openm6.inference.generate import BEAM, TEXT
from openm6.inference.labels import LABEL_PROBABILITIES
from openm6.inference.rank import PICTURE
from openm6.inference.refine import SKETCH
from openm6.inference.request import Mode, Request
from openm6.tasks.task import Task

MODES: tuple[Mode, ...] = (LABEL_PROBABILITIES, PICTURE, VECTOR, HEAD, SKETCH, BEAM, TEXT)
"""In order of precedence: a request is answered by the first that applies."""


def mode_of(task: Task, request: Request | None = None) -> Mode:
    """The kind of answer of a request, by default of one with the task's own options."""
    request = request or Request({})
    return next(mode for mode in MODES if mode.applies(task, request))

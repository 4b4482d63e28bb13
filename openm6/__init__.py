"""OpenM6: one Transformer that reads text, images and tables and writes text, images, labels and vectors.

    import openm6
    m6 = openm6.load("runs/demo/model")
    m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色?")

Names are imported when they are first used, so that `import openm6` costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openm6._version import __version__

if TYPE_CHECKING:
    from openm6.client import AsyncClient, Client
    from openm6.core.candidates import Candidate
    from openm6.core.errors import ContextLengthError, DataError, OpenM6Error, UsageError
    from openm6.inference.session import Session
    from openm6.tasks.task import Task

__all__ = [
    "AsyncClient",
    "Candidate",
    "Client",
    "ContextLengthError",
    "DataError",
    "OpenM6Error",
    "Session",
    "Task",
    "UsageError",
    "__version__",
    "load",
]  # fmt: skip

_PLACES = {
    "AsyncClient": "openm6.client",
    "Session": "openm6.inference.session",
    "Client": "openm6.client",
    "ContextLengthError": "openm6.core.errors",
    "DataError": "openm6.core.errors",
    "OpenM6Error": "openm6.core.errors",
    "Candidate": "openm6.core.candidates",
    "Task": "openm6.tasks.task",
    "UsageError": "openm6.core.errors",
}


def load(path: str, device: str | None = None, adapters: Mapping[str, str] | None = None) -> Session:
    """Open a model directory: `openm6.load("runs/demo/model").run("caption", photo="a.jpg")`; with `adapters` of it by
    names of your own, of which each request can take one: `.adapter("mine").run(...)`."""
    from openm6.inference.session import Session

    return Session.load(path, device, adapters=adapters)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module openm6 has no attribute {name}")

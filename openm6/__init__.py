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
    from openm6.bundle import Bundle
    from openm6.candidates import Painting
    from openm6.client import AsyncClient, Client
    from openm6.errors import ContextLengthError, DataError, OpenM6Error, UsageError
    from openm6.tasks.task import Task

__all__ = [
    "AsyncClient", "Bundle", "Client", "ContextLengthError", "DataError", "OpenM6Error", "Painting", "Task",
    "UsageError", "__version__", "load",
]  # fmt: skip

_PLACES = {
    "AsyncClient": "openm6.client",
    "Bundle": "openm6.bundle",
    "Client": "openm6.client",
    "ContextLengthError": "openm6.errors",
    "DataError": "openm6.errors",
    "OpenM6Error": "openm6.errors",
    "Painting": "openm6.candidates",
    "Task": "openm6.tasks.task",
    "UsageError": "openm6.errors",
}


def load(path: str, device: str | None = None, adapters: Mapping[str, str] | None = None) -> Bundle:
    """Open a model directory: `openm6.load("runs/demo/model").run("caption", photo="a.jpg")`; with `adapters` of it by
    names of your own, of which each request can take one: `.adapter("mine").run(...)`."""
    from openm6.bundle import Bundle

    return Bundle.load(path, device, adapters=adapters)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module openm6 has no attribute {name}")

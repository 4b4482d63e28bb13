"""OpenM6: a multimodal Transformer for images, text and tables.

    import openm6
    m6 = openm6.load("runs/demo/model")
    m6.run("vqa", photo="a.jpg", question="图中的商品是什么颜色？")

Names are imported on first use, so that `import openm6` takes milliseconds.
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

_MODULES = ("evaluate", "model")
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
    """Open a model directory: `openm6.load("runs/demo/model").run("caption", photo="a.jpg")`.

    `device`: a PyTorch device such as "cpu" or "cuda:1", by default a GPU if there is one. `adapters`: directories of
    adapters of the model by names of your choice, used by `.adapter("name").run(...)`. Raises UsageError for a path
    that is not a model directory."""
    from openm6.inference.session import Session

    return Session.load(path, device, adapters=adapters)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"openm6.{name}")
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module openm6 has no attribute {name}")

"""The network: configuration and presets, embedders, attention and masks, blocks, experts, loss, the image codec."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm6.model.config import ModelConfig
    from openm6.model.loss import Output
    from openm6.model.m6 import M6

__all__ = ["M6", "ModelConfig", "Output"]

_PLACES = {"M6": "openm6.model.m6", "ModelConfig": "openm6.model.config", "Output": "openm6.model.loss"}


def __getattr__(name: str) -> Any:
    """Imported when they are first used: the presets beside them are read without PyTorch."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module openm6.model has no attribute {name}")

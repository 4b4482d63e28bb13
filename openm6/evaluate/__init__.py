"""Evaluation: answers scored on data with confidence intervals, reports, prediction of whole tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm6.evaluate.measure import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import PyTorch on first use."""
    if name in __all__:
        from openm6.evaluate import measure

        return getattr(measure, name)
    raise AttributeError(f"module openm6.evaluate has no attribute {name}")

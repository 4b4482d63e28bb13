"""Evaluation: answers scored on data with confidence intervals, reports, tables answered row by row."""

from openm6.evaluate.measure import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]

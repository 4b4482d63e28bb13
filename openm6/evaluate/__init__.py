"""Measuring a model on data: the tasks' metrics with confidence intervals, and reports to look at."""

from openm6.evaluate.measure import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]

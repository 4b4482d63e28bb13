"""Vectors kept and found again: an index on disk, filled by a model's tasks."""

from openm6.retrieve.index import Hit, Index

__all__ = ["Hit", "Index"]

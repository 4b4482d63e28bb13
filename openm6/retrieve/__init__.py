"""Vectors kept and found again: an index on disk, filled by a model's tasks; and a recommender on one."""

from openm6.retrieve.index import Added, Deleted, Hit, Index

__all__ = ["Added", "Deleted", "Hit", "Index"]

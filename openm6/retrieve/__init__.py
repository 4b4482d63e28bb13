"""Vector retrieval: an index on disk, filled with embeddings of a model's tasks, and a recommender on top of it."""

from openm6.retrieve.index import Added, Deleted, Hit, Index

__all__ = ["Added", "Deleted", "Hit", "Index"]

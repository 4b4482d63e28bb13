"""The cache of its own that every test of training has."""

from tests.train.conftest import cache  # noqa: F401

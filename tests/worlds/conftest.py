"""The cache of its own that every test of data has."""

from tests.data.conftest import cache  # noqa: F401

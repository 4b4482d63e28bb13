"""Data sets: readers and writers, columns, cached sources with random access, rejects, the loader that mixes them."""

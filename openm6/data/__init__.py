"""Data sets: readers and writers, columns, sources with random access and a cache, rejected records, the loader that
mixes sources."""

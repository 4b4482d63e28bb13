"""Data: readers of the usual formats, sources with random access, the demo data, and the loader that mixes them."""

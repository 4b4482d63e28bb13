"""One file a question. `python -m benchmarks NAME` or `openm6 bench NAME` runs one."""

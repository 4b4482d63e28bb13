"""Environment variables that OpenM6 reads, and what it reads of the machine."""

import sys
from contextlib import suppress
from pathlib import Path

EXTENSIONS = "OPENM6_EXTENSION"
"""Python files of the user's own, run first (openm6/tasks/extend.py), with the system's path separator between."""

CACHE = "OPENM6_CACHE"
"""Folder of generated and converted data; else ~/.cache/openm6."""

NO_CACHE = "OPENM6_NO_CACHE"
"""When it is set, files are read anew and their records are kept only until the program ends."""

HOME = "OPENM6_HOME"
"""Folder of jobs; else ~/.local/share/openm6."""

CATALOGUE = "OPENM6_CATALOGUE"
"""Database of the catalogue; else catalogue.db in OPENM6_HOME."""

ARTIFACTS = "OPENM6_ARTIFACTS"
"""Where the catalogue keeps files; else artifacts in OPENM6_HOME."""


def peak_resident() -> int:
    """Bytes of memory that this process has held at most since this was last asked (where the system lets nobody begin
    anew, since its start)."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with suppress(OSError, StopIteration):  # Linux, where the above counts what the process was forked from too
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        most = 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        Path("/proc/self/clear_refs").write_text("5")
    return most

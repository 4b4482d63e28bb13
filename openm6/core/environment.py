"""Environment variables of OpenM6, and facts about the machine."""

import sys
from contextlib import suppress
from pathlib import Path

EXTENSIONS = "OPENM6_EXTENSION"
"""Python files of the user, run first (openm6/tasks/extend.py), separated by the system's path separator."""

CACHE = "OPENM6_CACHE"
"""Folder of generated and converted data; by default ~/.cache/openm6."""

NO_CACHE = "OPENM6_NO_CACHE"
"""If set, files are read again and their records kept only until the program ends."""

DTYPE = "OPENM6_DTYPE"
"""float32: compute in fp32 on machines with units for bf16, too."""

HOME = "OPENM6_HOME"
"""Folder of jobs; by default ~/.local/share/openm6."""

CATALOGUE = "OPENM6_CATALOGUE"
"""Database of the catalogue; by default catalogue.db in OPENM6_HOME."""

ARTIFACTS = "OPENM6_ARTIFACTS"
"""Folder of the catalogue's files; by default artifacts in OPENM6_HOME."""


def peak_resident() -> int:
    """Peak resident memory of this process in bytes since the last call (since its start where it cannot be reset)."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with suppress(OSError, StopIteration):  # Linux, where ru_maxrss includes the parent process
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        most = 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        Path("/proc/self/clear_refs").write_text("5")
    return most

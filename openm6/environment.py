"""Environment variables that OpenM6 reads."""

EXTENSIONS = "OPENM6_EXTENSION"
"""Python files of the user's own, run first (openm6/extend.py), with the system's path separator between."""

CACHE = "OPENM6_CACHE"
"""Folder of generated and converted data; else ~/.cache/openm6."""

HOME = "OPENM6_HOME"
"""Folder of jobs; else ~/.local/share/openm6."""

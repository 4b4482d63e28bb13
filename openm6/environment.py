"""Environment variables that OpenM6 reads."""

EXTENSIONS = "OPENM6_EXTENSION"
"""Python files of the user's own, run first (openm6/extend.py), with the system's path separator between."""

CACHE = "OPENM6_CACHE"
"""Folder of generated and converted data; else ~/.cache/openm6."""

HOME = "OPENM6_HOME"
"""Folder of jobs; else ~/.local/share/openm6."""

CATALOGUE = "OPENM6_CATALOGUE"
"""Database of the catalogue; else catalogue.db in OPENM6_HOME."""

ARTIFACTS = "OPENM6_ARTIFACTS"
"""Where the catalogue keeps files; else artifacts in OPENM6_HOME."""

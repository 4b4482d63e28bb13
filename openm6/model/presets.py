"""The named sizes of the network (model/presets.yaml), read without PyTorch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from openm6.core.errors import UsageError, suggest


@cache
def presets() -> dict[str, dict[str, Any]]:
    """The changed sizes of every preset, by its name."""
    content: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).with_name("presets.yaml")).read_text("utf-8"))
    return content


def find_preset(name: str) -> dict[str, Any]:
    """The sizes of one preset. Raises UsageError where there is none."""
    if name not in presets():
        raise UsageError(f'There is no preset "{name}".{suggest(name, set(presets()))} Known: {", ".join(presets())}.')
    return presets()[name]

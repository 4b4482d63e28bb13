"""Sizes as people write them."""

from __future__ import annotations

import math
import re


def size_of(text: str, plain: float = math.nan) -> float:
    """Bytes of a size such as `80GB`, `74.5 GiB` or `512mb`; a number alone is multiplied by `plain` bytes.

    Raises ValueError for anything else, and for a number alone without `plain`."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:E[+-]?[0-9]+)?)\s*((?:[KMGTP]I?)?B)?", text.strip().upper())
    if not found or (found[2] is None and math.isnan(plain)):
        raise ValueError(text)
    unit = found[2]
    return float(found[1]) * (plain if unit is None else (1024 if "I" in unit else 1000) ** "BKMGTP".index(unit[0]))

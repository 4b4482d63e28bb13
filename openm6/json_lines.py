"""JSON lines: one value a line, whatever its texts hold.

Only a newline ends a line of JSON lines or of server-sent events. `str.splitlines`, and clients that read lines by it
(httpx), end one at U+0085, U+2028 and U+2029 too, which JSON leaves in a text as they are: what is written escapes
them, and what is read is split at newlines alone.
"""

from __future__ import annotations

import json
from typing import Any

_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def dumps(value: Any) -> str:
    """A value on one line, without its end."""
    return json.dumps(value, ensure_ascii=False).translate(_ENDS)


def lines_of(text: str) -> list[str]:
    """The lines that are not empty."""
    return [line for line in text.split("\n") if line.strip()]

"""JSON lines: one value a line, whatever its texts hold.

Only a newline ends a line of JSON lines or of server-sent events. `str.splitlines`, and clients that read lines by it
(httpx), end one at U+0085, U+2028 and U+2029 too, which JSON leaves in a text as they are: what is written escapes
them, and what is read is split at newlines alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


_BYTES = "__base64__"


def dumps(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """A value on one line, without its end; `default` (such as `plain`) for what JSON does not know."""
    return json.dumps(value, ensure_ascii=False, default=default).translate(_ENDS)


def plain(value: Any) -> Any:
    """For JSON: bytes as base64 in an object of their own, which `loads` opens; numpy's values as numbers and lists;
    anything else, dates above all, as text."""
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def loads(text: str | bytes) -> Any:
    """What was written with `plain`, bytes as bytes again."""
    held = _BYTES in text if isinstance(text, str) else _BYTES.encode() in text
    return json.loads(text, object_hook=_opened if held else None)  # a hook is slow


def _opened(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES]) if value.keys() == {_BYTES} else value


def lines_of(text: str) -> list[str]:
    """The lines that are not empty."""
    return [line for line in text.split("\n") if line.strip()]

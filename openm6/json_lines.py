"""JSON lines: one value a line, whatever its texts hold.

Only a newline ends a line of JSON lines or of server-sent events. `str.splitlines`, and clients that read lines by it
(httpx), end one at U+0085, U+2028 and U+2029 too, which JSON leaves in a text as they are: what is written escapes
them, and what is read is split at newlines alone.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


_BYTES = "__base64__"


def dumps(value: Any, default: Callable[[Any], Any] | None = None, allow_nan: bool = True) -> str:
    """A value on one line, without its end; `default` (such as `plain`) for what JSON does not know. Raises ValueError
    for NaN and Infinity where they are not allowed."""
    return json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan).translate(_ENDS)


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


DEPTH = 100
"""Levels of lists and objects inside each other that are read at most."""

_DEEP = f"nests more than {DEPTH} levels"
_MARK = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.S)  # a text that does not end is one too

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Fault:
    """A value that `parse` could not take, in its place."""

    reason: str


def parse(text: str) -> Any:
    """A JSON value from outside; a number, constant or object that cannot be used is a Fault, which `fault_of` finds.

    Of a list, an element that nests too deeply is a Fault too. Raises json.JSONDecodeError where it is not JSON,
    ValueError where anything else nests too deeply.
    """
    try:
        return _read(text)
    except RecursionError:
        if not text.lstrip().startswith("["):
            raise ValueError(_DEEP) from None
    found: list[Any] = []
    for start, end in _elements(text):
        try:
            found.append(_read(text[start:end]))
        except RecursionError:
            found.append(Fault(_DEEP))
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, text, start + error.pos) from None
    return found


def has_more_values(text: str, most: int) -> bool:
    """Whether JSON holds more values than `most`, as far as commas and brackets tell; it is not read for that."""
    if sum(map(text.count, ",[{")) <= most:
        return False
    marks = (mark for mark in _MARK.finditer(text) if mark[0] in (",", "[", "{"))
    return next(islice(marks, most, None), None) is not None


def _read(text: str) -> Any:
    return json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_unique)


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Where the elements of a list begin and end, without recursion, whatever is inside of them."""
    depth = start = end = 0
    for mark in _MARK.finditer(text):
        if mark[0] in ("]", "}", ",") and depth == 1:
            yield start, mark.start()
        if mark[0] in ("[", "{"):
            depth += 1
        elif mark[0] in ("]", "}"):
            depth -= 1
        if depth <= 1 and mark[0] in ("[", ","):
            start = mark.end()
        if depth == 0:
            end = mark.end()
            break
    if not end or text[end - 1] != "]" or text[end:].strip():
        raise json.JSONDecodeError("The list does not end as a list", text, end or len(text))


def fault_of(value: Any) -> str | None:
    """Why a parsed value cannot be used, as a verb with its object; None where it can.

    Half characters (lone surrogates) in texts or keys, numbers that are too large, NaN and Infinity, a key that is
    named twice, more than 100 levels.
    """
    rest = [(value, 0)]
    while rest:
        one, depth = rest.pop()
        if isinstance(one, str):
            if not one.isascii() and _SURROGATE.search(one):
                return "holds half a character (a lone surrogate such as \\ud83d)"
        elif isinstance(one, Fault):
            return one.reason
        elif isinstance(one, (dict, list)):
            if depth == DEPTH:
                return _DEEP
            rest += [(part, depth + 1) for part in one]
            if isinstance(one, dict):
                rest += [(part, depth + 1) for part in one.values()]
    return None


def _integer(digits: str) -> int | Fault:
    return int(digits) if len(digits) <= 1000 else Fault(f"holds a number of {len(digits)} digits")


def _float(digits: str) -> float | Fault:
    value = float(digits)
    return value if math.isfinite(value) else Fault(f"holds a number that is too large ({digits[:40]})")


def _constant(name: str) -> Fault:
    return Fault(f"holds {name}, which JSON does not know")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Fault:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return Fault(f"names the key {twice[:40]!r} twice")
    return found

"""The columns of an index beside its vectors: types, conversion of values, messages for invalid filters.

A value is stored exactly or refused. A column without a given type gets the narrowest type that holds every value of
the data. All cells of a CSV or TSV are text; a column whose cells are all numbers or true/false gets that type, and a
column with leading zeros (`007`) or with more digits than a number holds stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from numbers import Integral
from typing import Any

from openm6.core.errors import DataError, UsageError, cut, suggest
from openm6.data.store import Record

TYPES = {"bool": "bool", "int": "int64", "float": "float64", "text": "string"}
"""Type names of the interface, narrowest first, and those of `index.json`."""

_NAMES = {kind: name for name, kind in TYPES.items()}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-][0-9]+)?")
_SWITCHES = {"true": True, "false": False}


def type_of(column: str, name: str) -> str:
    """The type called `name` (bool, int, float, text, or as `index.json` writes it). Raises UsageError."""
    kind = TYPES.get(name, name)
    if kind not in _NAMES:
        hint = f"{suggest(name, list(TYPES))} Known: {', '.join(TYPES)}."
        raise UsageError(f"The column {column} cannot have the type {name!r}.{hint}")
    return kind


def describe(columns: Mapping[str, str]) -> str:
    """`price float, colour text`."""
    return ", ".join(f"{name} {_NAMES[kind]}" for name, kind in columns.items()) or "no columns"


def convert(value: Any, kind: str) -> Any:
    """The value as stored in a column of this type; None, and "" unless the type is text, become null.

    Raises ValueError if the stored value would differ: 99.5 as int, 2**60 + 1 as float, "cheap" as float.
    """
    if value is None or (value == "" and kind != "string"):
        return None
    if type(value).__module__ == "numpy" and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool):
        if kind == "bool":
            return value
    elif isinstance(value, str):
        if kind == "string":
            return value
        if kind == "bool" and value.lower() in _SWITCHES:
            return _SWITCHES[value.lower()]
        if kind in ("int64", "float64") and _NUMBER.fullmatch(value):
            return _exact(Decimal(value) if set(value) & set(".eE") else int(value), kind)
    elif isinstance(value, (int, float)) and kind != "bool":
        return str(value) if kind == "string" else _exact(value, kind)
    elif isinstance(value, date) and kind == "string":
        return value.isoformat()
    raise ValueError


def _exact(value: int | float | Decimal, kind: str) -> int | float:
    if kind == "int64":
        same = -(2**63) <= value < 2**63 and value == int(value)
    elif isinstance(value, Decimal):
        same = Decimal(repr(float(value))) == value  # a CSV cell 0.1 is the float printed as 0.1
    else:
        same = isinstance(value, float) or abs(value) <= 2**53
    if not same:
        raise ValueError
    return int(value) if kind == "int64" else float(value)


def convert_at(where: str, column: str, value: Any, kind: str) -> Any:
    """`convert` for the value of a record. Raises DataError that names the record and the column."""
    try:
        return convert(value, kind)
    except ValueError:
        raise DataError(
            f"{where}: {column} is {cut(repr(value))}, and the column {column} of the index has the type "
            f"{_NAMES[kind]}, which cannot store that exactly: correct the record, or build an index with another "
            f"type (--keep {column}:text)."
        ) from None


def id_of(where: str, value: Any) -> str:
    """An item's id as text: 7 and "7" are the same id. Raises DataError unless it is a text or an integer."""
    if isinstance(value, bool) or not isinstance(value, (str, Integral)) or value == "":
        shown = "missing" if value in (None, "") else cut(repr(value))
        raise DataError(f"{where}: the id is {shown}: an id is a text or a whole number.")
    return str(value)


def types_of(records: Iterable[Record], names: Sequence[str], is_text_table: bool) -> dict[str, str]:
    """The type of each column, inferred from all values. `is_text_table`: all cells are text (CSV, TSV).

    Raises UsageError for a column without values, and, naming two records, for one whose values have no common type.
    """
    left = {name: list(_NAMES) for name in names}
    seen: dict[str, tuple[str, Any]] = {}
    for number, record in enumerate(records):
        for name in names:
            value = record.get(name)
            if value is None or (is_text_table and value == ""):
                continue
            where = str(record.get("_where", f"record {number}"))
            first = seen.setdefault(name, (where, value))
            left[name] = [kind for kind in left[name] if _fits(value, kind, is_text_table)]
            if not left[name]:
                raise UsageError(
                    f"The column {name} has values of no common type, {cut(repr(first[1]))} ({first[0]}) and "
                    f"{cut(repr(value))} ({where}): an index stores {', '.join(TYPES)}. Correct the data, or "
                    f"name the type (--keep {name}:text)."
                )
    for name in names:
        if name not in seen and not is_text_table:
            raise UsageError(f"The column {name} is empty: name its type (--keep {name}:text).")
    return {name: left[name][0] if name in seen else "string" for name in names}


def _fits(value: Any, kind: str, is_text_table: bool) -> bool:
    """True if a value allows this type to be inferred; texts count as numbers only in a text table."""
    try:
        convert(value, kind)
    except ValueError:
        return False
    if isinstance(value, str):
        return kind == "string" or is_text_table
    return kind != "string" and not (kind == "int64" and isinstance(value, float))


def filter_error(where: str, error: Exception, columns: Mapping[str, str]) -> UsageError:
    """LanceDB's error for an invalid filter, translated into a message about this index."""
    reason = " ".join(str(error).split())
    if found := re.search(r"No field named \"?(.+?)\"?\. Valid fields", reason):
        name = found[1]
        hint = suggest(name, list(columns)) or f" A text stands in single quotes: '{name}'."
        message = f"there is no column {name!r}.{hint}"
    elif found := re.search(r"literal ([A-Z][a-z]+)\d*\((.*?)\) .* of type '([A-Z][a-z]+)", reason):
        kinds = {"Utf": "text", "Boolean": "bool", "Int": "int", "Float": "float"}
        got, want = kinds.get(found[1], "number"), kinds.get(found[3], "number")
        value = found[2].replace('"', "'") if got == "text" else found[2]
        message = f"a column of the type {want} is compared with {value}, which is of the type {got}"
    elif "does not return a boolean" in reason:
        message = "it is not a condition that is true or false"
    elif found := re.search(r"Invalid function '(\w+)'", reason):
        message = f"there is no function {found[1]!r}"
    elif found := re.search(r"parser error: ([^)]*)", reason):
        message = f"it is not an SQL condition ({found[1].rstrip('.')})"
    else:
        message = "it fails on the items of the index"
    message += "" if message.endswith((".", "?")) else "."
    return UsageError(
        f"The filter {where!r} cannot be used: {message} Columns: id text, {describe(columns)}. "
        "Example: price < 100 AND colour = '红色'."
    )

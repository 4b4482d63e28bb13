"""What is wrong with a recipe or a chain, in words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from openm6.errors import suggest


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation, in one sentence with key, value and what is allowed."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    kind, more = first["type"], len(error.errors()) - 1
    if kind == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        text = f"unknown key {key}.{suggest(str(first['loc'][-1]), known)} Known here: {', '.join(known)}."
    elif kind == "missing":
        text = f"the key {key} is missing."
    else:
        reason = first["msg"].removeprefix("Value error, ")
        text = f"{key or 'recipe'} is {first['input']!r}: {reason[0].lower()}{reason[1:]}."
    return text + (f" ({more} more problem{'s' if more > 1 else ''}.)" if more else "")


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Names of the keys of the section at a place such as ("data", 0)."""
    section: Any = model
    for part in place:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        section = next((a for a in getattr(section, "__args__", ()) if isinstance(a, type)), section)
    return list(section.model_fields)

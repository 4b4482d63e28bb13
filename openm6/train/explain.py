"""Error messages for the mistakes in a recipe or a chain."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from openm6.core.errors import suggest


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Every problem of a validation, each in one sentence with key, value and what is allowed; several stand on lines
    of their own."""
    found = [_sentence(one, model) for one in error.errors()]
    return found[0] if len(found) == 1 else "\n  ".join([f"{len(found)} problems:", *found])


def _sentence(problem: Any, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        return f"unknown key {key}.{suggest(str(problem['loc'][-1]), known)} Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"the key {key} is missing."
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'recipe'} is {problem['input']!r}: {reason[0].lower()}{reason[1:]}."


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Names of the keys of the section at a place such as ("data", 0)."""
    section: Any = model
    for part in place:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        section = next((a for a in getattr(section, "__args__", ()) if isinstance(a, type)), section)
    return list(section.model_fields)

"""What is wrong with a request whose fields do not fit: a code for programs, a sentence, and the field."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from openm6.errors import cut, suggest


def fault_of_request(request: Request, error: RequestValidationError) -> tuple[str, str, str | None]:
    """Code, message and field of the first error: `missing_required_parameter`, `unknown_parameter`, `invalid_type` or
    `invalid_value`."""
    first = error.errors()[0]
    place = [str(part) for part in first.get("loc", ())[1:]]
    kind, param, message = first["type"], ".".join(place), str(first.get("msg"))
    if kind == "missing":
        return "missing_required_parameter", f"{param or 'The body'} is missing.", param or None
    if kind == "extra_forbidden":
        fields = _fields(request, place[:-1])
        nearest = suggest(place[-1], fields) or (f" It takes {', '.join(fields)}." if fields else "")
        return "unknown_parameter", f"There is no field {cut(param)}.{nearest}", param
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return code, f"{param}: {message}" if param else message, param or None


def _fields(request: Request, place: list[str]) -> list[str]:
    """The fields that a route's body, or an object in it, may have."""
    model = request.scope["route"].body_field.field_info.annotation
    for name in place:
        if not name.isdigit():
            inner = model.model_fields.get(name)
            model = inner and _model_in(inner.annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _model_in(one))), None)

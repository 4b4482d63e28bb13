"""The error of a request whose fields do not fit its route: a code for programs, a sentence, and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import FormData

from openm6.core.errors import UsageError, cut, suggest


def fault_of_request(request: Request, error: RequestValidationError) -> UsageError:
    """The first error of a request, with its field as `param` and the code `missing_required_parameter`,
    `unknown_parameter`, `invalid_type` or `invalid_value`."""
    first = error.errors()[0]
    place = _place(first, error.body)
    kind, param, message = first["type"], ".".join(place), str(first.get("msg"))
    if kind == "missing":
        code, message = "missing_required_parameter", f"{param or 'The body'} is missing."
    elif kind == "extra_forbidden":
        fields = _fields(request, place[:-1])
        nearest = suggest(place[-1], fields) or (f" It takes {', '.join(fields)}." if fields else "")
        code, message = "unknown_parameter", f"There is no field {cut(param)}.{nearest}"
    elif kind in ("model_attributes_type", "model_type", "dict_type"):
        code, message = "invalid_type", f"{param or 'The body'} has to be a JSON object."
    elif isinstance(error.body, FormData) and kind == "value_error":
        code, message = "invalid_type", f"{param} has to be sent as a file."
    else:
        code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
        message = f"{param}: {message}" if param else message
    return UsageError(message, code=code, param=param or None)


def _place(error: Mapping[str, Any], body: Any) -> list[str]:
    """The path of an error in a request, without the names that pydantic adds for the types it tried."""
    source, *parts = error.get("loc", ("",))
    if source != "body":
        return [str(part) for part in parts]
    place, value = [], body
    for number, part in enumerate(parts, 1):
        is_there = part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int)
        if is_there or (number == len(parts) and error["type"] == "missing"):
            place.append(str(part))
            value = value[part] if is_there else None
    return place


def _fields(request: Request, place: list[str]) -> list[str]:
    """Names of the fields of a route's body, or of an object in it."""
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

"""Request bodies: of the type that the route accepts, JSON without ambiguity, and the fields of it.

JSON is read by the rules for files of records (core/files.py): UTF-8, no lone surrogates, no NaN, no duplicate keys.
A request has fields of its own, fields of OpenAI's API that change nothing here, and fields refused by name. An error
names the place.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import Any, ClassVar, Literal

from fastapi import Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import FormData

from openm6.core.errors import ErrorKind, Refusal, UsageError, cut, suggest
from openm6.core.files import dumps, fault_of, has_more_values, parse

LARGE = 2**20
"""Size, in bytes, above which a body is large. Routes for texts alone accept no large body; elsewhere a busy server
refuses them first, and they are parsed on another thread."""
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

VALUES = 2**16
"""Maximum number of values of a body, or of a line of one: parsing millions of small ones would block for seconds."""

_READER = ThreadPoolExecutor(1, "large-json")
"""Reads large bodies, one after the other, beside the event loop."""


async def json_of(body: bytes, what: str = "The body") -> Any:
    """The value of a JSON body, or of a line of one. Raises UsageError, with the place, for what is not JSON, and
    Refusal (TOO_LARGE) for too many values."""
    if len(body) <= LARGE:
        return _parsed(body, what)
    return await asyncio.get_running_loop().run_in_executor(_READER, _parsed, body, what)


def _parsed(body: bytes, what: str) -> Any:
    value = None
    try:
        text = body.decode("utf-8-sig")
        if text.lstrip().startswith("["):  # no request is a list, and deep ones take long
            raise UsageError(f"{what} has to be a JSON object, not a list.", code="invalid_type")
        if has_more_values(text, VALUES):
            raise Refusal(ErrorKind.TOO_LARGE, f"{what} has more than {VALUES:,} values.")
        value = parse(text)
    except UnicodeDecodeError as error:
        fault: str | None = f"is not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        fault = f"is not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
    except ValueError as error:
        fault = str(error)
    else:
        fault = fault_of(value)
    if fault:
        raise UsageError(f"{what} {fault}.", code="invalid_json")
    return value


class Route(APIRoute):
    """A route that reads its body by `json_of` and refuses other media types."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        is_form = isinstance(self.body_field.field_info, params.Form)

        async def checked(request: Request) -> Response:
            headers = request.headers
            if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                _check_type(headers.get("content-type", ""), is_form)
                if not is_form:
                    request = _JsonRequest(request.scope, request.receive)
                    request.value = await json_of(await request.body())
            return await handle(request)

        return checked


class _JsonRequest(Request):
    value: Any = None

    async def json(self) -> Any:
        return self.value


def _check_type(given: str, is_form: bool) -> None:
    """Raises Refusal (UNSUPPORTED_MEDIA_TYPE) for a Content-Type that the route does not accept."""
    wanted = FORMS[0] if is_form else "application/json"
    if not given:
        raise _unsupported(f"The body has no Content-Type: send it as {wanted}.")
    header = Message()
    header["content-type"] = given
    kind = header.get_content_type()
    if not (kind in FORMS if is_form else kind == wanted or kind.endswith("+json")):
        raise _unsupported(f"The body is sent as {given[:80]}: send it as {wanted}.")
    charset = str(header.get_param("charset") or "utf-8").lower()
    if not is_form and charset not in ("utf-8", "utf8", "us-ascii"):
        raise _unsupported(f"JSON has to be sent in UTF-8, not in {charset[:40]}.")


def _unsupported(message: str) -> Refusal:
    return Refusal(ErrorKind.UNSUPPORTED_MEDIA_TYPE, message)


Passing = tuple[Any, ...] | None
"""The accepted values of a field that is ignored; None: all values. A null is always accepted."""

ANY: Passing = None


class Fields(BaseModel):
    """The body of a request. A null stands for the default. An ignored field whose value would change the answer is
    refused by name, an unknown field with the nearest known name.

    others   fields of OpenAI's API that are ignored here
    prefix   the field that holds these ones, with a dot
    """

    model_config = ConfigDict(extra="forbid")

    others: ClassVar[Mapping[str, Passing]] = {}
    prefix: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        """The fields of this model alone. Raises UsageError for others."""
        if not isinstance(values, Mapping):
            return values
        kept = {}
        for name, value in values.items():
            if name not in cls.model_fields:
                cls._check(name, value)
            elif value is not None:
                kept[name] = value
        return kept

    @classmethod
    def _check(cls, name: str, value: Any) -> None:
        param = f"{cls.prefix}{cut(name)}"
        if name not in cls.others:
            nearest = suggest(name, [*cls.model_fields, *cls.others]) or f" It takes {', '.join(cls.model_fields)}."
            raise UsageError(f"There is no field {param}.{nearest}", code="unknown_parameter", param=param)
        passing = cls.others[name]
        if value is None or passing is None or value in passing:
            return
        send = f", or send {' or '.join(map(dumps, passing))}" if passing else ""
        shown = cut(value if isinstance(value, str) else dumps(value, default=lambda _: "a file"))
        message = f"The field {param} is not supported with the value {shown}: leave it out{send}."
        raise UsageError(message, code="unsupported_parameter", param=param)


class AskingFields(Fields):
    """Fields of every request to a model."""

    model: str | None = Field(None, description="a model's name; the first one by default")
    adapter: str | None = Field(None, description="one of the model's adapters")
    truncate: Literal["start"] | None = Field(None, description="leave out the beginning of a source that is too long")
    allow_untrained: bool = Field(False, description="ask a task that the model was not trained on, too")


def fault_of_request(error: RequestValidationError) -> UsageError:
    """The first error of a request whose fields are known, with its field as `param` and the code
    `missing_required_parameter`, `invalid_type` or `invalid_value`."""
    first = error.errors()[0]
    place = _place(first, error.body)
    kind, param, message = first["type"], ".".join(place), str(first.get("msg"))
    if kind == "missing":
        code, message = "missing_required_parameter", f"{param or 'The body'} is missing."
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

"""Request bodies: of the type that the route accepts, and JSON without ambiguity.

JSON is read by the rules for files of records (core/files.py): UTF-8, no lone surrogates, no NaN, no duplicate keys.
An error names the place.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import Any

from fastapi import Request, Response, params
from fastapi.routing import APIRoute

from openm6.core.errors import ErrorKind, Refusal, UsageError
from openm6.core.files import fault_of, has_more_values, parse
from openm6.serve.guard import LARGE

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

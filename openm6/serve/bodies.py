"""The body of a request: of the type that its route takes, and JSON that means one thing.

JSON is read by the rules that files of records are read by (core/files.py): UTF-8, no half characters, no NaN, no key
twice. What breaks one of them is refused with its place.
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

from openm6.core.files import fault_of, has_more_values, parse
from openm6.serve.guard import LARGE, Refusal

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

VALUES = 2**16
"""Values of a body, or of a line of one, at most: reading millions, however small, holds up everybody for seconds."""

_READER = ThreadPoolExecutor(1, "large-json")
"""Reads large bodies, one after the other, beside the event loop."""


async def json_of(body: bytes, what: str = "The body") -> Any:
    """The value that a body, or a line of one, holds. Raises Refusal: with the place where it is not JSON (400), or
    where it has too many values (413)."""
    if len(body) <= LARGE:
        return _parsed(body, what)
    return await asyncio.get_running_loop().run_in_executor(_READER, _parsed, body, what)


def _parsed(body: bytes, what: str) -> Any:
    value = None
    try:
        text = body.decode("utf-8-sig")
        if text.lstrip().startswith("["):  # no request is a list, and deep ones take long
            raise Refusal(400, f"{what} has to be a JSON object, not a list.", "invalid_type")
        if has_more_values(text, VALUES):
            raise Refusal(413, f"{what} has more than {VALUES:,} values.", "too_large")
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
        raise Refusal(400, f"{what} {fault}.", "invalid_json")
    return value


class Route(APIRoute):
    """A route that reads its body by `json_of`, and refuses one of another type (415)."""

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
    """Raises Refusal (415) for a Content-Type that the route does not take."""
    wanted = FORMS[0] if is_form else "application/json"
    if not given:
        raise Refusal(415, f"The body has no Content-Type: send it as {wanted}.", "unsupported_media_type")
    header = Message()
    header["content-type"] = given
    kind = header.get_content_type()
    if not (kind in FORMS if is_form else kind == wanted or kind.endswith("+json")):
        raise Refusal(415, f"The body is sent as {given[:80]}: send it as {wanted}.", "unsupported_media_type")
    charset = str(header.get_param("charset") or "utf-8").lower()
    if not is_form and charset not in ("utf-8", "utf8", "us-ascii"):
        raise Refusal(415, f"JSON is read in UTF-8, not in {charset[:40]}.", "unsupported_media_type")

"""Exceptions for users' mistakes and for work that failed, and the one table of their kinds.

Every message has one or two sentences: the problem, its place (file, line or record, key), the remedy. The command line
prints the message alone and exits with `exit_code`; the SDK lets the exception through."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Any

INVALID_REQUEST = "invalid_request_error"
"""OpenAI's error type for a fault of the request."""
SERVER_ERROR = "server_error"


class ErrorKind(StrEnum):
    """The kind of an error, which decides how it is reported; the words of its message never do.

    status        HTTP status
    type          OpenAI's error type
    retry_after   seconds after which the same request may succeed, where waiting helps; an error may know better
    """

    status: int
    type: str
    retry_after: float | None

    def __new__(cls, value: str, status: int, type: str, retry_after: float | None = None) -> "ErrorKind":
        self = str.__new__(cls, value)
        self._value_, self.status, self.type, self.retry_after = value, status, type, retry_after
        return self

    INVALID = "invalid", 400, INVALID_REQUEST
    UNAUTHORIZED = "unauthorized", 401, INVALID_REQUEST
    FORBIDDEN = "forbidden", 403, INVALID_REQUEST
    NOT_FOUND = "not_found", 404, INVALID_REQUEST
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, INVALID_REQUEST
    REQUEST_TIMEOUT = "request_timeout", 408, INVALID_REQUEST
    CONFLICT = "conflict", 409, INVALID_REQUEST
    TOO_LARGE = "too_large", 413, INVALID_REQUEST
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type", 415, INVALID_REQUEST
    FULL = "full", 429, "requests", 1.0
    REQUEST_LIMIT = "requests", 429, "requests", 1.0
    TOKEN_LIMIT = "tokens", 429, "tokens", 1.0
    CANCELLED = "cancelled", 499, INVALID_REQUEST
    INTERNAL = "internal", 500, SERVER_ERROR
    DIED = "died", 503, SERVER_ERROR, 1.0
    STARTING = "starting", 503, SERVER_ERROR, 1.0
    STOPPING = "stopping", 503, SERVER_ERROR, 1.0
    DEADLINE = "deadline", 504, SERVER_ERROR
    MEMORY = "memory", 507, SERVER_ERROR


class OpenM6Error(Exception):
    """Work that could not be done: exit code 1.

    kind          how the error is reported over HTTP, between processes and in statistics
    code          the error in one word, for programs; finer than the kind, which is its default where it is given
    param         the name of the field or option that is at fault, where there is one
    retry_after   seconds after which the same request may succeed, where waiting helps
    """

    exit_code = 1
    kind = ErrorKind.INTERNAL
    code = "failed"

    def __init__(
        self, message: str = "", *, kind: ErrorKind | None = None, code: str | None = None, param: str | None = None,
        retry_after: float | None = None,
    ):  # fmt: skip
        super().__init__(_printable(message))
        self.kind = kind or type(self).kind
        self.code = code or (str(kind) if kind else type(self).code)
        self.param = param if param is None else _printable(param)
        self.retry_after = self.kind.retry_after if retry_after is None else retry_after

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form: {"error": {"message", "type", "code", "param"}}."""
        return {"error": {"message": str(self), "type": self.kind.type, "code": self.code, "param": self.param}}


class UsageError(OpenM6Error):
    """An invalid request: unknown key, wrong type, missing slot. Exit code 2."""

    exit_code = 2
    kind = ErrorKind.INVALID
    code = "invalid"


class DataError(OpenM6Error):
    """An unusable record, file or picture. Exit code 1."""

    kind = ErrorKind.INVALID
    code = "invalid"


class ContextLengthError(UsageError, DataError):
    """A text or prompt of more positions than the model has. As an invalid request it has exit code 2; among many
    records it is a record that cannot be used, and only that record is skipped."""

    code = "context_length_exceeded"


class Refusal(OpenM6Error):
    """A request that a server refuses, or could not answer, for a reason of this kind."""

    def __init__(self, kind: ErrorKind, message: str, code: str | None = None, **more: Any):
        super().__init__(message, kind=kind, code=code, **more)


def _printable(text: str) -> str:
    """The text with lone surrogates, which can be neither printed nor sent, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def suggest(word: str, known: list[str] | tuple[str, ...] | set[str]) -> str:
    """`' Did you mean "caption"?'` when a known word is close to `word`, else `''`."""
    import difflib

    close = difflib.get_close_matches(word[:100], sorted(known), n=1)  # its time is quadratic in their lengths
    return f' Did you mean "{close[0]}"?' if close else ""


def suggest_path(path: str | Path) -> str:
    """`' Did you mean "runs/goods/model"?'` when a file or folder of a similar name exists, else `''`."""
    wanted, here = Path(path), Path()
    for part in wanted.parts:
        if (here / part).exists():
            here /= part
            continue
        import difflib

        names = [one.name for one in here.iterdir()] if here.is_dir() and os.access(here, os.R_OK) else []
        close = difflib.get_close_matches(part[:100], sorted(names), n=1)
        if not close:
            return ""
        here /= close[0]
    return "" if here == wanted else f' Did you mean "{here}"?'


def set_once(values: dict[str, str], name: str, value: str) -> None:
    """Add a command line's name and value to `values`. Raises UsageError where the name has another value already."""
    if values.setdefault(name, value) != value:
        raise UsageError(f'{name} is given twice: "{values[name]}" and "{value}".')


def cut(name: object, length: int = 40) -> str:
    """A user's name or value for a message: on one line, at most `length` characters."""
    text = " ".join(str(name)[: 100 * length].split())
    return text if len(text) <= length else text[:length] + "..."

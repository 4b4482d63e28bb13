"""The access log: one line of JSON for each request, written by the guard, with details from the routes."""

from __future__ import annotations

import logging
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from openm6.core.errors import ErrorKind, Refusal

log = logging.getLogger("openm6.access")


@dataclass
class LogEntry:
    """A line of the access log, without contents and secrets."""

    method: str
    path: str
    status: int = 0
    ms: float = 0.0
    code: str = ""
    key: str = ""
    model: str = ""
    task: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    request: str = field(default_factory=lambda: uuid.uuid4().hex[:16])


current: ContextVar[LogEntry | None] = ContextVar("entry", default=None)
"""The log entry of the current request."""


def note(model: str, task: str, prompt_tokens: int = 0, tokens: int = 0) -> None:
    """Note model and task of the current request in its log entry; tokens add up."""
    if (entry := current.get()) is not None:
        entry.model, entry.task = model, task
        entry.prompt_tokens += prompt_tokens
        entry.tokens += tokens


def unforeseen() -> Refusal:
    """The error to report for an unforeseen exception, which is logged; to be called where it is handled."""
    entry = current.get() or LogEntry("", "")
    entry.status = 500
    logging.getLogger("openm6.serve").exception("request %s failed", entry.request)
    return Refusal(ErrorKind.INTERNAL, "The server failed at this request, and its log says why.")

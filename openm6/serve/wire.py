"""Messages between the server and its workers: MessagePack, each with its length before it, over a socket pair."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any, BinaryIO

import msgpack
import numpy as np
import torch
from PIL import Image

from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, ErrorKind, OpenM6Error, Refusal
from openm6.core.images import png

_LENGTH = struct.Struct(">I")
LARGEST = 2**28
"""Maximum number of bytes of a message."""

_FOREIGN: tuple[tuple[type[Exception], ErrorKind], ...] = (
    (TimeoutError, ErrorKind.DEADLINE), (CancelledError, ErrorKind.CANCELLED), (MemoryError, ErrorKind.MEMORY),
    (torch.OutOfMemoryError, ErrorKind.MEMORY),
)  # fmt: skip
"""Kinds of exceptions that are not OpenM6Errors; all others are internal."""


def packed(message: Mapping[str, Any]) -> bytes:
    """A message as bytes. Raises DataError for one that is too large, or for a value that cannot be sent."""
    try:
        body: bytes = msgpack.packb(message, default=_plain, use_bin_type=True)
    except UnicodeEncodeError:
        raise DataError("A text holds half a character (a lone surrogate such as \\ud83d).") from None
    if len(body) > LARGEST:
        raise DataError(f"A message of {len(body) / 2**20:.0f} MiB; {LARGEST / 2**20:.0f} are the most.")
    return _LENGTH.pack(len(body)) + body


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = stream.read(_LENGTH.unpack(head)[0])
    return _unpacked(body)


class Messages(asyncio.Protocol):
    """The server's end of a connection: calls `hear` with each message, and `end` when the connection is closed. Many
    pieces of text arrive at once, so that nothing is awaited for a single one."""

    def __init__(self, hear: Callable[[dict[str, Any]], None], end: Callable[[], None]):
        self._hear, self._end, self._rest = hear, end, bytearray()

    def data_received(self, data: bytes) -> None:
        rest, place = self._rest, 0
        rest += data
        while len(rest) - place >= _LENGTH.size:
            end = place + _LENGTH.size + _LENGTH.unpack_from(rest, place)[0]
            if len(rest) < end:
                break
            self._hear(_unpacked(rest[place + _LENGTH.size : end]))
            place = end
        del rest[:place]

    def connection_lost(self, error: Exception | None) -> None:
        self._end()


def _unpacked(body: bytes | bytearray) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(body, raw=False, strict_map_key=False)
    return found


def _plain(value: Any) -> Any:
    """Values that MessagePack has no type for: pictures as PNG, arrays as lists, candidates as dicts."""
    if isinstance(value, Image.Image):
        return png(value)
    if isinstance(value, Candidate):
        return {
            "image": value.image, "number": value.number, "seed": value.seed, "score": value.score,
            "estimates": value.estimates, "uncertain": value.uncertain, "codes": value.codes.tolist(),
        }  # fmt: skip
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, int):
        raise DataError("A whole number of more than 64 bits cannot be used.")
    raise TypeError(f"{type(value).__name__} cannot be sent.")


def kind_of(error: Exception) -> ErrorKind:
    """The kind under which an exception is reported to the client."""
    if isinstance(error, OpenM6Error):
        return error.kind
    return next((kind for foreign, kind in _FOREIGN if isinstance(error, foreign)), ErrorKind.INTERNAL)


def error_of(error: Exception) -> dict[str, Any]:
    """The message that reports an error: {"error": its kind, "message", "code", "param", "retry_after"}."""
    known = error if isinstance(error, OpenM6Error) else Refusal(kind_of(error), told_of(error))
    return {
        "error": str(known.kind), "message": str(known), "code": known.code, "param": known.param,
        "retry_after": known.retry_after,
    }  # fmt: skip


def refusal_of(message: Mapping[str, Any]) -> Refusal:
    """The error that a message reports (see error_of)."""
    kind, more = ErrorKind(message["error"]), {name: message[name] for name in ("code", "param", "retry_after")}  # type: ignore[call-arg]
    return Refusal(kind, message["message"], **more)


def told_of(error: Exception) -> str:
    """The sentence for the client; of an unforeseen exception the name of its class alone."""
    if isinstance(error, (OpenM6Error, TimeoutError, CancelledError)):
        return str(error)
    if kind_of(error) is ErrorKind.MEMORY:
        return "The request takes more memory than there is."
    return f"The request failed ({type(error).__name__})."

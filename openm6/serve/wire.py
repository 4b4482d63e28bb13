"""Messages between the server and its workers: MessagePack with its length before it, over a socket pair."""

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
from openm6.core.errors import DataError, OpenM6Error, UsageError
from openm6.core.images import png

_LENGTH = struct.Struct(">I")
LARGEST = 2**28
"""Bytes of a message at most."""

INVALID, DEADLINE, MEMORY, FULL = "invalid", "deadline", "memory", "full"
DIED, INTERNAL, CANCELLED, STOPPING = "died", "internal", "cancelled", "stopping"
"""Kinds of errors."""


def packed(message: Mapping[str, Any]) -> bytes:
    """Raises DataError for a message that is too large, or that holds what cannot be sent."""
    try:
        body: bytes = msgpack.packb(message, default=_plain, use_bin_type=True)
    except UnicodeEncodeError:
        raise DataError("A text holds half a character (a lone surrogate such as \\ud83d).") from None
    if len(body) > LARGEST:
        raise DataError(f"A message of {len(body) / 2**20:.0f} MiB; {LARGEST / 2**20:.0f} are the most.")
    return _LENGTH.pack(len(body)) + body


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = stream.read(_LENGTH.unpack(head)[0])
    return _unpacked(body)


class Messages(asyncio.Protocol):
    """The server's end: `hear` is called with each message, `end` when there will be no more. Many pieces of text come
    at once, which is why nothing is awaited for one."""

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
    """What MessagePack does not know: pictures as PNG, arrays as lists, candidates as dicts."""
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


def kind_of(error: Exception) -> str:
    """What kind of error it is to whoever asked."""
    if isinstance(error, (UsageError, DataError)):
        return INVALID
    if isinstance(error, TimeoutError):
        return DEADLINE
    if isinstance(error, CancelledError):
        return CANCELLED
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return MEMORY
    return INTERNAL


def error_of(error: Exception) -> dict[str, Any]:
    """An error as it is sent: {"error": its kind, "message", "code", "param"}."""
    kind = kind_of(error)
    code, param = (error.code, error.param) if isinstance(error, OpenM6Error) else (kind, None)
    return {"error": kind, "message": told_of(error), "code": code, "param": param}


def told_of(error: Exception) -> str:
    """The sentence for whoever asked; of what is no fault of theirs the kind alone."""
    if isinstance(error, (OpenM6Error, TimeoutError, CancelledError)):
        return str(error)
    if kind_of(error) == MEMORY:
        return "The request takes more memory than there is."
    return f"The request failed ({type(error).__name__})."

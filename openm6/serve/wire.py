"""Messages between the server and its workers, MessagePack over a socket pair; and what a worker is started with."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from PIL import Image

from openm6.core.candidates import Candidate
from openm6.core.errors import DataError, ErrorKind, OpenM6Error, Refusal
from openm6.core.images import png

LARGEST = 2**28
"""Maximum number of bytes of a message."""
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the engine.

    capacity       maximum number of positions of a text with its prompt; 0: the model's
    cache_mib      memory for keys and values of texts in progress, and as much for those of jobs (pictures, beams)
    prefix_mib     memory for recently read prompts, and as much for features of recent pictures
    batch          maximum number of requests in a job, and of prompts in a prefill
    prefill        maximum number of prompt positions that are read between two steps of the texts in progress
    """

    capacity: int = 0
    cache_mib: int = 512
    prefix_mib: int = 64
    batch: int = 16
    prefill: int = 2048


@dataclass(frozen=True, slots=True)
class Place:
    """The model directory that a process serves, and the directories of its adapters by name."""

    model: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)


def packed(message: Mapping[str, Any]) -> bytes:
    """A message as bytes. Raises DataError for one that is too large, or for a value that cannot be sent."""
    try:
        body: bytes = msgpack.packb(message, default=_plain, use_bin_type=True)
    except UnicodeEncodeError:
        raise DataError("A text holds half a character (a lone surrogate such as \\ud83d).") from None
    if len(body) > LARGEST:
        raise DataError(f"A message of {len(body) / 2**20:.0f} MiB; {LARGEST / 2**20:.0f} are the most.")
    return body


def received(connection: socket.socket | None = None) -> Any:
    """An iterator over the messages that arrive on a connection, until it is closed; without one, over those in the
    bytes that its `feed` was given."""
    stream = connection.makefile("rb", buffering=0) if connection else None  # a read returns what has arrived
    return msgpack.Unpacker(stream, read_size=2**18, max_buffer_size=2 * LARGEST, raw=False, strict_map_key=False)


class Messages(asyncio.Protocol):
    """The server's end of a connection: calls `hear` with each message, and `end` when the connection is closed. Many
    pieces of text arrive at once, so that nothing is awaited for a single one."""

    def __init__(self, hear: Callable[[dict[str, Any]], None], end: Callable[[], None]):
        self._hear, self._end, self._received = hear, end, received()

    def data_received(self, data: bytes) -> None:
        self._received.feed(data)
        for message in self._received:
            self._hear(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._end()


def _plain(value: Any) -> Any:
    """Values that MessagePack has no type for: pictures as PNG, arrays as lists, candidates as dicts."""
    if isinstance(value, Image.Image):
        return png(value)
    if isinstance(value, Candidate):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, int):
        raise DataError("A whole number of more than 64 bits cannot be used.")
    raise TypeError(f"{type(value).__name__} cannot be sent.")


def late() -> Refusal:
    return Refusal(ErrorKind.DEADLINE, "The request's deadline has passed.")


def reported(error: Exception) -> OpenM6Error:
    """The error as the client is told of it. An unforeseen exception, whose traceback is printed, becomes INTERNAL with
    the name of its class alone."""
    if isinstance(error, OpenM6Error):
        return error
    if isinstance(error, OUT_OF_MEMORY):
        return Refusal(ErrorKind.MEMORY, "The request takes more memory than there is.")
    traceback.print_exception(error)
    return Refusal(ErrorKind.INTERNAL, f"The request failed ({type(error).__name__}).")


def error_of(error: Exception) -> dict[str, Any]:
    """The message that reports an error: {"error": its kind, "message", "code", "param", "retry_after"}."""
    known = reported(error)
    return {
        "error": str(known.kind), "message": str(known), "code": known.code, "param": known.param,
        "retry_after": known.retry_after,
    }  # fmt: skip


def refusal_of(message: Mapping[str, Any]) -> Refusal:
    """The error that a message reports (see error_of)."""
    kind, more = ErrorKind(message["error"]), {name: message[name] for name in ("code", "param", "retry_after")}  # type: ignore[call-arg]
    return Refusal(kind, message["message"], **more)

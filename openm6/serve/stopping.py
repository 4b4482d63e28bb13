"""Shutdown of a server: refuse new requests for a while, then close the socket and finish running requests."""

from __future__ import annotations

import asyncio
import signal
import time
from types import FrameType

import uvicorn

from openm6.serve.fleet import Fleet


class LingeringServer(uvicorn.Server):
    """Answers new requests with 503 for `linger` seconds after SIGTERM before its socket closes, so that a load
    balancer learns from /readyz to send requests elsewhere. A second signal, or Ctrl-C, closes the socket at once."""

    def __init__(self, config: uvicorn.Config, fleet: Fleet, linger: float):
        super().__init__(config)
        self._fleet, self._linger = fleet, linger

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM or self._fleet.closing:
            self._linger = 0.0
        self._fleet.closing = True
        super().handle_exit(sig, frame)

    async def main_loop(self) -> None:
        await super().main_loop()
        began = time.monotonic()
        while time.monotonic() - began < self._linger:
            await asyncio.sleep(0.05)

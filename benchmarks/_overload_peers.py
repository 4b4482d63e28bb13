"""The harmful side of benchmarks/overload.py, in processes of its own.

`python -m benchmarks._overload_peers load URL RATE SECONDS BYTES PATH ...` sends large texts and half-sent bodies in
turn, RATE a second, and prints the number of answers by status (0: closed without an answer). `... sink` is a server
that refuses every request once it has read its head, and prints its port: it measures what sending alone costs.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from urllib.parse import urlsplit

import numpy as np
import uvloop

REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
PART = 2**18
"""Bytes that are sent before another look whether the server has answered."""


async def load(url: str, rate: float, seconds: float, size: int, paths: list[str]) -> Counter[str]:
    address = urlsplit(url)
    rng, counts = np.random.default_rng(1), Counter[str]()
    text = json.dumps({"inputs": {"text": "红" * (size // 3)}}, ensure_ascii=False).encode()

    async def one(path: str, body: bytes, sent: int) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        answer = b""
        try:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            reading = asyncio.ensure_future(reader.read(64))
            try:
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
                for start in range(0, sent, PART):
                    writer.write(body[start : min(sent, start + PART)])
                    draining = asyncio.ensure_future(writer.drain())
                    await asyncio.wait({draining, reading}, return_when=asyncio.FIRST_COMPLETED)
                    if reading.done():
                        draining.cancel()
                        break
                    await draining
                answer = await asyncio.wait_for(reading, 30)
            finally:
                reading.cancel()
                writer.transport.abort()
        except (OSError, TimeoutError):
            pass
        what = "large" if sent == len(body) else "half-sent"
        counts[f"{what} {answer[9:12].decode() or '0'}"] += 1

    started, due, running = time.perf_counter(), 0.0, []
    while (due := due + rng.exponential(1 / rate)) < seconds:
        if (wait := started + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        number, is_large = divmod(len(running), 2)
        body = text if is_large else text[:2000]
        sent = len(body) if is_large else len(body) // 2
        running.append(asyncio.create_task(one(paths[number % len(paths)], body, sent)))
    await asyncio.gather(*running)
    return counts


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(REFUSED)
        await reader.read()
    writer.transport.abort()


async def sink() -> None:
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        uvloop.run(sink())
    else:
        url, rate, seconds, size, *paths = sys.argv[2:]
        print(json.dumps(uvloop.run(load(url, float(rate), float(seconds), int(size), paths))))

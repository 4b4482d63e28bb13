"""A server that refuses everything as soon as it has read a head, and prints its port: `python -m
benchmarks._overload_sink`. What is sent to it costs the machine what sending costs."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import uvloop

REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(REFUSED)
        await reader.read()
    writer.transport.abort()


async def main() -> None:
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())

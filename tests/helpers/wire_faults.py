"""A wire to a server that can be cut or frozen, as if the server had died or stood still: `async with wire(port)`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Wire:
    """Forwards connections to a port of this machine. `connections` counts those that were made."""

    def __init__(self, port: int) -> None:
        self.connections = 0
        self._to = port
        self._server: asyncio.Server | None = None
        self._runs = asyncio.Event()
        self._runs.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._port = 0

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def listen(self) -> None:
        """Accept connections, also after `kill`, as a server that was started again."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Reset every connection and listen no longer, as a process that was killed."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    def freeze(self) -> None:
        """Accept connections and bytes, and pass nothing on, as a process that was stopped."""
        self._runs.clear()

    def thaw(self) -> None:
        self._runs.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with suppress(OSError):
            back, onward = await asyncio.open_connection("127.0.0.1", self._to)
            self._writers.add(onward)
            await asyncio.gather(self._pass_on(reader, onward), self._pass_on(back, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                await self._runs.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def wire(port: int) -> AsyncIterator[Wire]:
    made = Wire(port)
    await made.listen()
    try:
        yield made
    finally:
        made.thaw()
        made.kill()

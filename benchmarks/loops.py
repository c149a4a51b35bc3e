"""What the channel could stand on: one echo over a Unix socket, by event loop and library.

    python -m benchmarks.loops [--seconds 0.5]

The other end is always the same process with blocking sockets, as a replica's thread has. `framed` is our FramedSocket
on the loop's `add_reader`; `streams` are asyncio's. uvloop and pyzmq are measured where they are installed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from expertmesh.cluster.channel.framed_socket import FramedSocket, tuned
from expertmesh.cluster.channel.messages import LENGTH

SIZES = {"64 B": 64, "64 KiB": 64 * 1024, "1 MiB": 1024 * 1024}
Echo = Callable[[bytes], Awaitable[None]]


def serve(path: str) -> None:
    """Echo messages on blocking sockets, one connection after the other."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        buffer = memoryview(bytearray(LENGTH.size + max(SIZES.values())))
        while True:
            got = connection.recv_into(buffer[: LENGTH.size], 0, socket.MSG_WAITALL)
            if got < LENGTH.size:
                break
            size = LENGTH.unpack(buffer[: LENGTH.size])[0]
            connection.recv_into(buffer[LENGTH.size : LENGTH.size + size], 0, socket.MSG_WAITALL)
            connection.sendall(buffer[: LENGTH.size + size])
        connection.close()


def connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


async def blocking(path: str) -> Echo:
    """No loop at all: what the kernel and Python take."""
    connection = connected(path)
    buffer = bytearray(max(SIZES.values()))

    async def echo(body: bytes) -> None:
        connection.sendmsg([LENGTH.pack(len(body)), body])
        connection.recv_into(buffer, LENGTH.size, socket.MSG_WAITALL)
        connection.recv_into(buffer, len(body), socket.MSG_WAITALL)

    return echo


async def framed(path: str) -> Echo:
    """FramedSocket on the loop that runs."""
    loop = asyncio.get_running_loop()
    end = FramedSocket(tuned(connected(path)))
    waiting: list[asyncio.Future[None]] = []

    def readable() -> None:
        for _ in end.receive(most=1):
            waiting.pop().set_result(None)

    def writable() -> None:
        if end.flush():
            loop.remove_writer(end.fileno())

    loop.add_reader(end.fileno(), readable)

    async def echo(body: bytes) -> None:
        waiting.append(loop.create_future())
        if not end.send([LENGTH.pack(len(body)), body]):
            loop.add_writer(end.fileno(), writable)
        await waiting[-1]

    return echo


async def streams(path: str) -> Echo:
    """asyncio's own streams."""
    reader, writer = await asyncio.open_unix_connection(path, limit=4 * 2**20)

    async def echo(body: bytes) -> None:
        writer.writelines([LENGTH.pack(len(body)), body])
        await writer.drain()
        await reader.readexactly(LENGTH.size + len(body))

    return echo


async def zmq_pair(path: str) -> Echo:
    """pyzmq on asyncio, both ends in threads of its own."""
    zmq, aio = import_module("zmq"), import_module("zmq.asyncio")
    context = aio.Context()
    near, far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    near.bind(f"ipc://{path}.zmq")
    far.connect(f"ipc://{path}.zmq")

    async def mirror() -> None:
        while True:
            await far.send(await far.recv(copy=False), copy=False)

    asyncio.get_running_loop().create_task(mirror())

    async def echo(body: bytes) -> None:
        await near.send(body, copy=False)
        await near.recv(copy=False)

    return echo


async def measured(make: Callable[[str], Awaitable[Echo]], path: str, seconds: float) -> dict[str, float]:
    """Median seconds of an echo, by size."""
    echo, found = await make(path), {}
    for name, size in SIZES.items():
        body, times = bytes(size), []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            await echo(body)
            times.append(time.perf_counter() - begin)
        found[name] = statistics.median(times)
    return found


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each size")
    options = parser.parse_args()
    ways: dict[str, tuple[Any, Any]] = {
        "blocking sockets": (blocking, asyncio.run),
        "framed, asyncio": (framed, asyncio.run),
        "framed, uvloop": (framed, "uvloop"),
        "streams, asyncio": (streams, asyncio.run),
        "streams, uvloop": (streams, "uvloop"),
        "pyzmq, asyncio": (zmq_pair, asyncio.run),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "echo")
        process = multiprocessing.Process(target=serve, args=(path,), daemon=True)
        process.start()
        while not Path(path).exists():
            time.sleep(0.01)
        for name, (make, run) in ways.items():
            try:
                runner = import_module("uvloop").run if run == "uvloop" else run
                found = runner(measured(make, path, options.seconds))
            except ImportError as error:
                print(f"{name:<18} skipped: {error}")
                continue
            print(f"{name:<18} " + "   ".join(f"{size} {1e6 * value:8.0f} us" for size, value in found.items()))
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()

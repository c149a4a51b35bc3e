"""A live gateway under malformed streams: it lives, codes are right, memory comes back, valid calls are answered."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import numpy as np
import psutil
import pytest
from helpers.front import Front, opened, raw_stream
from helpers.waiting import run_async, until

from expertmesh.cluster.client.client import AsyncClient
from expertmesh.cluster.gateway.streams import StreamLimits
from expertmesh.cluster.rpc.streams import Opening, chunks
from expertmesh.experts import wire
from expertmesh.experts.errors import BY_NAME

MIB = 2**20
X = np.arange(-512, 512, dtype=np.float32).reshape(64, 16)
FRAME = wire.encode("call", {"layer": "l"}, {"x": wire.WireTensor.from_numpy(X)})
OPENING = Opening(total=len(FRAME)).encode()
OF_THE_CALLER = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DATA_LOSS", "RESOURCE_EXHAUSTED"}


async def code_of(front: Front, channel: object, messages: list[bytes], stop: bool = False) -> str:
    """The code of a stream of these messages; with `stop` it is cancelled after them."""
    stream = raw_stream(channel)
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):  # the status says why
        for message in messages:
            await stream.write(message)
        if stop:
            stream.cancel()
        await stream.done_writing()
        async for _ in stream:
            pass
    code = (await stream.code()).name
    if code in ("OK", "CANCELLED"):
        return str(code)
    if code == "INTERNAL" and "Internal error from Core" in str(await stream.details()):
        return "CUT"  # gRPC loses the status of a stream that ends during a write
    trailers = {key: str(value) for key, value in await stream.trailing_metadata()}
    assert BY_NAME[trailers["expertmesh-error"]].code == code
    assert trailers["x-request-id"]
    return str(code)


async def check_valid_calls(client: AsyncClient) -> None:
    for stream in (True, False):
        np.testing.assert_array_equal(await client.forward("l", X, stream=stream), np.abs(X))


WRONG: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "INVALID_ARGUMENT"),
    "an empty message": ([b""], "INVALID_ARGUMENT"),
    "garbage first": ([b"\xff" * 64], "INVALID_ARGUMENT"),
    "the frame without an opening": ([FRAME], "INVALID_ARGUMENT"),
    "an opening of another kind": ([wire.encode("call", {"total": 5})], "INVALID_ARGUMENT"),
    "a total of 0": ([wire.encode("stream", {"total": 0, "chunk": 4096})], "INVALID_ARGUMENT"),
    "a negative total": ([wire.encode("stream", {"total": -5, "chunk": 4096})], "INVALID_ARGUMENT"),
    "a total beyond the limit": ([Opening(total=2**30 + 1).encode()], "RESOURCE_EXHAUSTED"),
    "a total beyond any machine": ([Opening(total=2**62).encode()], "RESOURCE_EXHAUSTED"),
    "a chunk of 0 bytes": ([OPENING, FRAME[:10], b"", FRAME[10:]], "INVALID_ARGUMENT"),
    "one byte less": ([OPENING, FRAME[:-1]], "DATA_LOSS"),
    "one byte more": ([OPENING, FRAME, b"x"], "DATA_LOSS"),
    "one byte more at once": ([OPENING, FRAME + b"x"], "DATA_LOSS"),
    "only the opening": ([OPENING], "DATA_LOSS"),
    "the opening twice": ([OPENING, OPENING, FRAME], "DATA_LOSS"),
    "a frame that is none": ([Opening(total=100).encode(), bytes(100)], "INVALID_ARGUMENT"),
    "a frame that is cut": ([Opening(total=100).encode(), FRAME[:100]], "DATA_LOSS"),
    "another layer": ([Opening(total=len(wire.encode("call", {"layer": "m"}))).encode(),
                       wire.encode("call", {"layer": "m"})], "INVALID_ARGUMENT"),
    "a status frame": ([Opening(total=len(wire.encode("status", {}))).encode(), wire.encode("status", {})],
                       "INVALID_ARGUMENT"),
}  # fmt: skip


def test_every_wrong_stream_has_its_code() -> None:
    async def main() -> None:
        async with opened() as front, front.channel() as channel, front.client() as client:
            for case, (messages, code) in WRONG.items():
                assert await code_of(front, channel, messages) in (code, "CUT"), case
                await check_valid_calls(client)
            assert (len(front.gateway.streams), front.gateway.streams.reserved) == (0, 0)

    run_async(main())


def mutations(chance: random.Random) -> Iterator[tuple[list[bytes], bool]]:
    """Streams of a valid call with something wrong, or stopped in the middle."""

    def flip(data: bytes) -> bytes:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]

    def opening() -> bytes:
        return Opening(total=max(1, len(FRAME) + chance.choice((-100, -1, 0, 0, 0, 1, 100)))).encode()

    changes: list[Callable[[list[bytes]], list[bytes]]] = [
        lambda sent: sent,
        lambda sent: [flip(sent[0]), *sent[1:]],
        lambda sent: [sent[0], *(flip(chunk) for chunk in sent[1:])],
        lambda sent: sent[: chance.randrange(len(sent))],
        lambda sent: [*sent, chance.choice(sent)],
        lambda sent: [*sent[:1], b"", *sent[1:]],
        lambda sent: chance.sample(sent, len(sent)),
        lambda sent: [opening(), *sent[1:]],
        lambda sent: [chance.randbytes(chance.randrange(200)), *sent[1:]],
    ]
    while True:
        sent = [OPENING, *chunks([FRAME], chance.choice((97, 1000, 4096, MIB)))]
        yield chance.choice(changes)(sent), chance.random() < 0.2


@pytest.mark.slow
def test_1500_mutated_streams_and_valid_calls_between_them() -> None:
    async def main() -> None:
        streams = mutations(random.Random(20260805))
        process = psutil.Process(os.getpid())
        counts: dict[str, int] = {}
        async with opened() as front, front.channel() as channel, front.client() as client:
            for _ in range(100):
                await code_of(front, channel, *next(streams))
            before = process.memory_info().rss
            for number in range(1_500):
                code = await code_of(front, channel, *next(streams))
                counts[code] = counts.get(code, 0) + 1
                if number % 50 == 0:
                    await check_valid_calls(client)
            await check_valid_calls(client)
            await until(lambda: not len(front.gateway.streams))
            assert process.memory_info().rss - before < 50 * MIB
        assert set(counts) <= OF_THE_CALLER | {"CUT", "CANCELLED", "UNAVAILABLE"}, counts  # NaN has no other expert
        assert min(counts[code] for code in ("OK", "INVALID_ARGUMENT", "DATA_LOSS", "CANCELLED")) > 50, counts

    run_async(main())


@pytest.mark.parametrize("sent", [0, 1, 20])
def test_40_streams_that_stop_in_the_middle_hold_no_memory_that_they_have_not_sent(sent: int) -> None:
    async def main() -> None:
        limits = StreamLimits(max_stream_bytes=80 * 2**28, stall_seconds=1.0)
        process = psutil.Process(os.getpid())
        async with opened(limits=limits) as front, front.channel() as channel, front.client() as client:
            await check_valid_calls(client)
            before = process.memory_info().rss
            admitted: list[int] = []
            reserve = front.gateway.streams._reserve

            def noted(stream: object, total: int) -> None:
                reserve(stream, total)
                admitted.append(total)

            front.gateway.streams._reserve = noted  # type: ignore[method-assign]
            streams = [raw_stream(channel) for _ in range(40)]
            for stream in streams:
                await stream.write(Opening(total=2**28).encode())
                for _ in range(sent):
                    await stream.write(bytes(10_000))
            await until(lambda: len(admitted) == 40)
            await check_valid_calls_beside(client)
            assert process.memory_info().rss - before < 100 * MIB
            await until(lambda: not len(front.gateway.streams))
            for stream in streams:
                assert (await stream.code()).name == "DEADLINE_EXCEEDED"
            await check_valid_calls(client)

    run_async(main())


async def check_valid_calls_beside(client: AsyncClient) -> None:
    """Calls in one message are answered whatever the streams hold."""
    np.testing.assert_array_equal(await client.forward("l", X, stream=False), np.abs(X))

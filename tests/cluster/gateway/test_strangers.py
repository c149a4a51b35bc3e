"""What callers may make the gateway keep: without a token a window of bytes, with one a bounded number of messages."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from benchmarks.breakage.raw_http2 import RawConnection
from helpers.front import METADATA, TOKEN, opened
from helpers.waiting import run_async, until

from expertmesh.cluster.gateway import streams as streams_module
from expertmesh.cluster.gateway.gateway import CallInfo
from expertmesh.cluster.gateway.streams import MAX_RECEIVING, StreamedCalls, StreamLimits
from expertmesh.cluster.rpc import channel_options
from expertmesh.cluster.rpc.channel_options import MAX_RECEIVED_BYTES, WINDOW_BYTES
from expertmesh.cluster.rpc.methods import METHODS, SERVICE
from expertmesh.experts.errors import DeadlineExceeded, InvalidRequest, Overloaded, TooLarge, Unauthenticated

MIB = 2**20
X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("method", [*(m for m in METHODS if m not in ("Check", "Watch")), "Check", "Watch", "None"])
def test_a_message_without_a_token_is_refused_before_it_is_received(method: str) -> None:
    service = "grpc.health.v1.Health" if method in ("Check", "Watch") else SERVICE

    def knock(port: int) -> list[int]:
        connections = [RawConnection(port) for _ in range(4)]
        taken = [each.half_a_message(1, f"/{service}/{method}", 3 * MIB) for each in connections]
        assert not any(each.closed for each in connections)
        for each in connections:
            while 1 not in each.ended and each.listen():
                pass
            assert each.ended == {1}
            each.close()
        return taken

    async def main() -> None:
        async with opened() as front:
            assert max(await asyncio.to_thread(knock, front.server.port)) <= WINDOW_BYTES
            async with front.client() as client:
                np.testing.assert_array_equal(await client.forward("l", X), X)

    run_async(main())


def test_a_message_with_a_token_is_received_but_not_waited_for_without_end() -> None:
    def knock(port: int) -> tuple[int, bool]:
        connection = RawConnection(port, patience=5.0)
        taken = connection.half_a_message(1, f"/{SERVICE}/Call", 3 * MIB, token=TOKEN)
        while 1 not in connection.ended and connection.listen():
            pass
        connection.close()
        return taken, 1 in connection.ended

    async def main() -> None:
        async with opened(limits=StreamLimits(stall_seconds=0.5)) as front:
            taken, ended = await asyncio.to_thread(knock, front.server.port)
            assert (taken, ended) == (3 * MIB + 4, True)

    run_async(main())


def test_a_message_above_the_limit_is_not_received_even_with_a_token() -> None:
    async def main() -> None:
        async with opened() as front, front.channel() as channel, front.client() as client:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/Call")(bytes(MAX_RECEIVED_BYTES + 1), metadata=METADATA)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            large = np.ones((5 * MIB // 4, 1), np.float32)
            with pytest.raises(TooLarge, match="without stream=False"):
                await client.forward("l", large, stream=False)
            np.testing.assert_array_equal(await client.forward("l", large), large)

    run_async(main())


@pytest.mark.parametrize("size", [1000, 4 * MIB])
def test_a_refusal_before_the_message_reaches_both_kinds_of_client(size: int) -> None:
    message = bytes(size)

    def blocking(endpoint: str) -> grpc.StatusCode:
        with grpc.insecure_channel(endpoint) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{SERVICE}/Call")(message, timeout=20)
        return caught.value.code()

    async def main() -> None:
        async with opened() as front, front.channel() as channel:
            for _ in range(5):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(f"/{SERVICE}/Call")(message, timeout=20)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert await asyncio.to_thread(blocking, front.endpoint) is grpc.StatusCode.UNAUTHENTICATED

    run_async(main())


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_options, "MAX_CONNECTIONS", 3)

    def knock(port: int) -> list[bool]:
        connections = [RawConnection(port) for _ in range(6)]
        for each in connections:
            while each.listen():
                pass
        closed = [each.closed for each in connections]
        for each in connections:
            each.close()
        return closed

    async def main() -> None:
        async with opened() as front:
            assert sum(await asyncio.to_thread(knock, front.server.port)) == 3

    run_async(main())


def test_only_so_many_messages_of_one_token_are_received_at_a_time() -> None:
    async def main() -> None:
        calls, go, reading = StreamedCalls(StreamLimits()), asyncio.Event(), 0

        async def slow() -> bytes:
            nonlocal reading
            reading += 1
            await go.wait()
            return b"x"

        async def quick() -> bytes:
            return b"y"

        waiting = [asyncio.ensure_future(calls.one_message(slow, "a", 60.0)) for _ in range(MAX_RECEIVING + 9)]
        await until(lambda: reading == MAX_RECEIVING)
        assert await calls.one_message(quick, "b", 60.0) == b"y"  # another token does not wait for this one
        assert reading == MAX_RECEIVING
        go.set()
        assert await asyncio.gather(*waiting) == [b"x"] * (MAX_RECEIVING + 9)

    run_async(main())


def test_half_sent_calls_hold_up_no_other_method_and_what_waits_for_them_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams_module, "SLOT_SECONDS", 0.05)

    async def main() -> None:
        async with opened() as front, front.client() as client:
            go = asyncio.Event()

            async def half_sent() -> bytes:
                await go.wait()
                return b"x"

            call = CallInfo(request_id="r", token=TOKEN)
            calls = [asyncio.ensure_future(front.gateway.unary("Call", half_sent, call)) for _ in range(MAX_RECEIVING)]
            await asyncio.sleep(0)
            assert (await client.status())["state"] == "serving"
            assert await client.health("l") == "SERVING"
            for stream in (False, True):
                with pytest.raises(Overloaded, match="64 messages of this token are being received") as caught:
                    await client.forward("l", X, stream=stream)
                assert caught.value.retry_after > 0
            go.set()
            assert {type(end) for end in await asyncio.gather(*calls, return_exceptions=True)} == {InvalidRequest}
            np.testing.assert_array_equal(await client.forward("l", X), X)

    run_async(main())


def test_a_message_waits_as_long_as_those_before_it_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "SLOT_SECONDS", 0.5)

    async def main() -> None:
        calls = StreamedCalls(StreamLimits())

        async def slow() -> bytes:
            await asyncio.sleep(0.05)
            return b"x"

        waiting = [calls.one_message(slow, "a", 60.0) for _ in range(20 * MAX_RECEIVING)]
        assert await asyncio.gather(*waiting) == [b"x"] * (20 * MAX_RECEIVING)

    run_async(main())


def test_a_message_that_does_not_come_is_given_up_and_nothing_is_no_message() -> None:
    async def main() -> None:
        calls = StreamedCalls(StreamLimits(stall_seconds=0.01))

        async def never() -> Any:
            await asyncio.sleep(100)

        async def end() -> Any:
            return grpc.aio.EOF

        with pytest.raises(DeadlineExceeded, match=r"silent for 0\.01 s"):
            await calls.one_message(never, "a", 60.0)
        with pytest.raises(DeadlineExceeded, match="silent for 0 s"):
            await calls.one_message(never, "a", 0.0)
        with pytest.raises(InvalidRequest, match="before its message"):
            await calls.one_message(end, "a", 60.0)

    run_async(main())


def test_messages_in_flight_are_bounded_in_bytes_whatever_streams_hold() -> None:
    calls = StreamedCalls(StreamLimits(max_stream_bytes=1000))
    with calls.holding(600):
        with pytest.raises(Overloaded, match="hold 600 of the 1000 that max_stream_bytes"), calls.holding(401):
            pass
        with calls.holding(400):
            pass
    with calls.holding(1000):
        assert calls.reserved == 0


def test_a_token_is_looked_at_before_a_byte_is_read() -> None:
    async def read() -> bytes:
        raise AssertionError("the message was read")

    async def main() -> None:
        async with opened() as front:
            for method in front.gateway.methods:
                with pytest.raises(Unauthenticated):
                    await front.gateway.unary(method, read, CallInfo(request_id="r", token="x"))

    run_async(main())

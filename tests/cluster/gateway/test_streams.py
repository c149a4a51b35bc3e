"""Calls in chunks at the gateway: limits, memory that is reserved and given back, and streams that stop half-way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from helpers.front import TOKEN, Front, opened, raw_stream
from helpers.waiting import run_async, until

from expertmesh.cluster.gateway import streams as streams_module
from expertmesh.cluster.gateway.authorise import TokenTable
from expertmesh.cluster.gateway.frames import one_message, reply_parts
from expertmesh.cluster.gateway.gateway import CallInfo, Gateway, GatewaySettings
from expertmesh.cluster.gateway.streams import LEAST_RATE, StreamedCalls, StreamLimits
from expertmesh.cluster.machine.tokens import token_digest
from expertmesh.cluster.rpc.methods import Role
from expertmesh.cluster.rpc.status import ERROR_KEY, REQUEST_ID_KEY, RETRY_AFTER_KEY
from expertmesh.cluster.rpc.streams import ADMITTED, Opening, Streamed, StreamedAnswer
from expertmesh.experts import wire
from expertmesh.experts.errors import DataLoss, DeadlineExceeded, InvalidRequest, Overloaded, TooLarge
from expertmesh.experts.protocol import CallSummary
from expertmesh.experts.spec import Expert
from expertmesh.router.request.answer import ForwardReply

MIB = 2**20
X = np.arange(-6, 6, dtype=np.float32).reshape(4, 3)
FRAME = wire.encode("call", {"layer": "l", "request_id": "r-1"}, {"x": wire.WireTensor.from_numpy(X)})


class Context:
    """A stream of messages that are given; one that is a coroutine is awaited first. `written` is what came back."""

    def __init__(self, *messages: bytes | Callable[[], Awaitable[bytes]]) -> None:
        self._messages = iter(messages)
        self.written: list[bytes] = []

    async def read(self) -> Any:
        message = next(self._messages, None)
        return await message() if callable(message) else message

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        assert metadata == (ADMITTED,)

    async def write(self, message: bytes) -> None:
        self.written.append(message)


def reply_of(rows: int) -> ForwardReply:
    summary = CallSummary(request_id="r", epoch=1, versions={})
    return ForwardReply(output=torch.ones(rows, 1), summary=summary, lost_mass=torch.zeros(rows))


def answering(rows: int = 1) -> Callable[[wire.Frame], Awaitable[list[wire.Buffer]]]:
    async def answer(frame: wire.Frame) -> list[wire.Buffer]:
        return reply_parts(reply_of(rows))

    return answer


def streamed(frame: bytes = FRAME) -> list[bytes]:
    return list(Streamed([frame]).messages())


def received(messages: list[bytes]) -> wire.Frame:
    answer = StreamedAnswer(2**30)
    for message in messages:
        answer.take(message)
    return wire.decode(answer.finish())


def test_a_reply_comes_as_it_was_made_in_chunks_that_both_ends_take() -> None:
    async def main() -> None:
        for wanted, of_server, chunk in ((4096, 64 * MIB, 4096), (MIB, 5000, 5000), (8 * MIB, 64 * MIB, MIB)):
            first = Opening(total=len(FRAME), chunk=wanted).encode()
            context = Context(first, FRAME)
            await StreamedCalls(StreamLimits(), of_server).serve(context, "me", 10.0, answering(500_000))
            assert [len(message) for message in context.written[1:-1]] == [chunk] * (len(context.written) - 2)
            assert received(context.written).tensors["output"].shape == (500_000, 1)

    run_async(main())


def test_what_all_streams_hold_is_bounded_and_given_back() -> None:
    async def main() -> None:
        calls = StreamedCalls(StreamLimits(max_request_bytes=1000, max_stream_bytes=2500))
        go = asyncio.Event()

        async def wait() -> bytes:
            await go.wait()
            return bytes(1000)

        opening = Opening(total=1000).encode()
        first = [asyncio.ensure_future(calls.serve(Context(opening, wait), me, 10.0, answering())) for me in "ab"]
        await until(lambda: calls.reserved == 2000)
        with pytest.raises(Overloaded, match="2 streams hold 2000 of the 2500 that max_stream_bytes") as caught:
            await calls.serve(Context(Opening(total=501).encode()), "me", 10.0, answering())
        assert caught.value.retry_after > 0
        with pytest.raises(TooLarge, match="has 1001 bytes, but max_request_bytes of this cluster is 1000"):
            await calls.serve(Context(Opening(total=1001).encode()), "me", 10.0, answering())
        assert (len(calls), calls.reserved) == (2, 2000)
        first[0].cancel()
        go.set()
        results = await asyncio.gather(*first, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert (len(calls), calls.reserved) == (0, 0)

    run_async(main())


def test_a_reply_takes_the_place_of_its_request_and_may_be_too_large() -> None:
    async def main() -> None:
        calls = StreamedCalls(StreamLimits(max_request_bytes=10_000, max_stream_bytes=10_000))
        held: list[int] = []

        class Slow(Context):
            async def write(self, message: bytes) -> None:
                held.append(calls.reserved)
                await super().write(message)

        context = Slow(*streamed())
        await calls.serve(context, "me", 10.0, answering(2000))
        assert set(held) == {sum(map(len, context.written[1:]))}
        with pytest.raises(TooLarge, match=r"the reply has .* max_request_bytes of this cluster is 10000"):
            await calls.serve(Context(*streamed()), "me", 10.0, answering(20_000))
        assert calls.reserved == 0

    run_async(main())


def test_memory_that_the_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*shape: object) -> None:
        raise MemoryError

    async def main() -> None:
        calls = StreamedCalls(StreamLimits())
        monkeypatch.setattr(np, "empty", none_left)
        with pytest.raises(Overloaded, match="cannot allocate 1000 bytes"):
            await calls.serve(Context(Opening(total=1000).encode()), "me", 10.0, answering())
        assert calls.reserved == 0

    run_async(main())


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_silent_stream_is_ended(sent: int) -> None:
    async def main() -> None:
        async def silence() -> bytes:
            await asyncio.sleep(100)
            raise AssertionError

        messages = [Opening(total=len(FRAME)).encode(), FRAME[:50]][:sent]
        for stall, timeout, said in (
            (0.02, 10.0, "silent for 0.02 s, or too slow"),
            (10.0, 0.02, "did not finish within 0.02 s"),
        ):
            calls = StreamedCalls(StreamLimits(stall_seconds=stall))
            with pytest.raises(DeadlineExceeded, match=said):
                await calls.serve(Context(*messages, silence), "me", timeout, answering())
            assert calls.reserved == 0

    run_async(main())


def test_one_token_may_hold_half_of_what_all_streams_may_or_one_request() -> None:
    limits = [StreamLimits(max_request_bytes=1000, max_stream_bytes=most) for most in (1000, 1500, 2500)]
    assert [each.max_token_bytes for each in limits] == [1000, 1000, 1250]

    async def main() -> None:
        calls, go = StreamedCalls(limits[2]), asyncio.Event()

        async def wait() -> bytes:
            await go.wait()
            return bytes(1000)

        first = asyncio.ensure_future(calls.serve(Context(Opening(total=1000).encode(), wait), "a", 10.0, answering()))
        await until(lambda: calls.reserved == 1000)
        with pytest.raises(Overloaded, match="of this token hold 1000 of the 1250"):
            await calls.serve(Context(Opening(total=251).encode()), "a", 10.0, answering())
        with pytest.raises(DataLoss, match="ended after 0 of"):  # another token is let in
            await calls.serve(Context(Opening(total=1000).encode()), "b", 10.0, answering())
        go.set()
        with pytest.raises(InvalidRequest, match="magic"):
            await first
        with pytest.raises(DataLoss, match="ended after 0 of"):
            await calls.serve(Context(Opening(total=1000).encode()), "a", 10.0, answering())

    run_async(main())


@pytest.mark.parametrize("total", [MIB, 1024 * MIB])
def test_a_stream_that_trickles_is_ended_however_much_it_has_announced(
    total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]
    monkeypatch.setattr(streams_module, "_now", lambda: seconds[0])

    async def main() -> None:
        calls, sent = StreamedCalls(StreamLimits()), 0

        async def trickle() -> bytes:
            nonlocal sent
            seconds[0] += 9.0
            sent += 1
            await asyncio.sleep(0)
            return b"x"

        context = Context(Opening(total=total).encode(), *[trickle] * 1000)
        with pytest.raises(DeadlineExceeded, match="or too slow"):
            await calls.serve(context, "me", 60.0, answering())
        assert (calls.reserved, sent < 4) == (0, True)

    run_async(main())


def test_a_stream_may_be_as_slow_as_the_least_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(streams_module, "_now", lambda: seconds[0])

    async def main() -> None:
        frame = wire.encode("call", {"layer": "l"}, {"x": wire.WireTensor.from_numpy(np.zeros((MIB, 8), np.float32))})

        def slow(part: bytes) -> Callable[[], Awaitable[bytes]]:
            async def read() -> bytes:
                seconds[0] += len(part) / LEAST_RATE
                return part

            return read

        opening, *parts = streamed(frame)
        context = Context(opening, *map(slow, parts))
        await StreamedCalls(StreamLimits()).serve(context, "me", 60.0, answering())
        assert seconds[0] > 100.0
        assert received(context.written).kind == "reply"

    run_async(main())


def test_a_reply_that_nobody_reads_is_given_up() -> None:
    async def main() -> None:
        class Deaf(Context):
            async def write(self, message: bytes) -> None:
                await asyncio.sleep(100)

        calls = StreamedCalls(StreamLimits(stall_seconds=0.02))
        with pytest.raises(DeadlineExceeded, match="the reply was not read"):
            await calls.serve(Deaf(*streamed()), "me", 10.0, answering())
        assert calls.reserved == 0

    run_async(main())


def test_a_reply_in_one_message_names_the_setting_and_how_to_mend_it() -> None:
    parts = reply_parts(reply_of(1000))
    assert one_message(parts, 10_000) == b"".join(parts)
    with pytest.raises(TooLarge, match="max_message_bytes of this cluster is 4000: call with stream=True"):
        one_message(parts, 4000)


# over gRPC


async def refusal(stream: Any) -> tuple[str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    return caught.value.code().name, {key: str(value) for key, value in caught.value.trailing_metadata()}


def test_a_stream_is_answered_and_its_refusals_are_those_of_other_calls() -> None:
    async def main() -> None:
        async with opened() as front, front.channel() as channel:
            stream = raw_stream(channel)
            for message in streamed():
                await stream.write(message)
            await stream.done_writing()
            frame = received([message async for message in stream])
            assert frame.meta["request_id"] == "r-1"
            np.testing.assert_array_equal(frame.tensors["output"].to_numpy(), np.abs(X))
            wrong = raw_stream(channel, metadata=(("authorization", "Bearer x"), ("x-request-id", "r-2")))
            code, trailers = await refusal(wrong)
            assert (code, trailers[ERROR_KEY], trailers[REQUEST_ID_KEY]) == (
                "UNAUTHENTICATED", "Unauthenticated", "r-2",
            )  # fmt: skip
            front.gateway.drain()
            assert (await refusal(raw_stream(channel)))[0] == "UNAVAILABLE"
            assert len(front.gateway.streams) == 0

    run_async(main())


def test_a_stream_that_was_accepted_is_finished_when_the_gateway_drains() -> None:
    async def main() -> None:
        async with opened() as front, front.channel() as channel:
            stream = raw_stream(channel)
            opening, *rest = streamed()
            await stream.write(opening)
            await until(lambda: len(front.gateway.streams))
            front.gateway.drain()
            for message in rest:
                await stream.write(message)
            await stream.done_writing()
            assert received([message async for message in stream]).kind == "reply"

    run_async(main())


async def cancelled_while_sending(front: Front, stream: Any) -> None:
    await stream.write(Opening(total=1000 * MIB).encode())
    await stream.write(bytes(MIB))
    await until(lambda: len(front.gateway.streams))


async def cancelled_while_computing(front: Front, stream: Any) -> None:
    front.hold = asyncio.Event()
    for message in streamed():
        await stream.write(message)
    await stream.done_writing()
    await until(lambda: front.inside)


async def cancelled_while_reading(front: Front, stream: Any) -> None:
    x = np.ones((16 * 1024, 1024), np.float32)
    for message in streamed(wire.encode("call", {"layer": "l"}, {"x": wire.WireTensor.from_numpy(x)})):
        await stream.write(message)
    await stream.done_writing()
    await stream.read()
    await stream.read()


@pytest.mark.parametrize("when", [cancelled_while_sending, cancelled_while_computing, cancelled_while_reading])
def test_cancelling_ends_the_stream_and_frees_its_memory(when: Callable[[Front, Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened() as front, front.channel() as channel:
            stream = raw_stream(channel)
            await when(front, stream)
            assert front.gateway.streams.reserved >= len(FRAME)
            stream.cancel()
            await until(lambda: not len(front.gateway.streams))
            assert front.inside == 0
            await front.mesh.at_rest()

    run_async(main())


def test_40_streams_that_announce_a_gibibyte_and_send_nothing() -> None:
    async def main() -> None:
        limits = StreamLimits(stall_seconds=1.0)
        async with opened(limits=limits) as front, front.channel() as channel, front.client() as client:
            streams = [raw_stream(channel) for _ in range(40)]
            for stream in streams:
                await stream.write(Opening(total=1024 * MIB).encode())
            answers = asyncio.gather(*(refusal(stream) for stream in streams))
            await until(lambda: len(front.gateway.streams) == 1)
            np.testing.assert_array_equal(await client.forward("l", X), np.abs(X))
            codes = await answers
            assert sorted(code for code, _ in codes) == ["DEADLINE_EXCEEDED"] + ["RESOURCE_EXHAUSTED"] * 39
            assert {trailers[RETRY_AFTER_KEY] for code, trailers in codes if code == "RESOURCE_EXHAUSTED"} == {"1000"}
            np.testing.assert_array_equal(await client.forward("l", X, stream=True), np.abs(X))
            assert len(front.gateway.streams) == 0

    run_async(main())


def test_a_refusal_comes_while_the_client_still_sends() -> None:
    async def main() -> None:
        async with opened(limits=StreamLimits(max_request_bytes=32 * MIB)) as front, front.client() as client:
            with pytest.raises(TooLarge, match="max_request_bytes of this cluster is 33554432"):
                await client.forward("l", np.ones((40 * MIB, 1), np.float32))

    run_async(main())


def test_an_expert_that_makes_much_of_little_needs_a_stream() -> None:
    def widen(rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat(1, 5000)

    async def main() -> None:
        async with opened(Expert.from_function(widen), max_message_bytes=64 * 1024) as front, front.client() as client:
            with pytest.raises(TooLarge, match="max_message_bytes of this cluster is 65536: call with stream=True"):
                await client.forward("l", X)
            answered = front.answered
            y = await client.forward("l", X, stream=True)
            np.testing.assert_array_equal(y, np.tile(X, (1, 5000)))
            assert front.answered == answered + 1

    run_async(main())


def test_what_a_slow_stream_took_is_not_left_for_the_router() -> None:
    seconds, timeouts = [100.0], []

    async def status() -> dict[str, Any]:
        return {}

    async def late() -> bytes:
        seconds[0] += 4.0
        return streamed()[1]

    async def main() -> None:
        async with opened() as front:
            forward = front.mesh.router.forward

            async def noted(request: Any) -> Any:
                timeouts.append(request.timeout)
                return await forward(request)

            front.mesh.router.forward = noted  # type: ignore[method-assign]
            tokens = TokenTable()
            tokens.add(token_digest(TOKEN), Role.READER)
            gateway = Gateway(front.mesh.router, tokens, GatewaySettings(), status, clock=lambda: seconds[0])
            first, *_ = streamed()
            context = Context(first, late)
            await gateway.stream(context, CallInfo(request_id="r", token=TOKEN, deadline=110.0))
            assert received(context.written).kind == "reply"
        assert timeouts == [6.0]

    run_async(main())

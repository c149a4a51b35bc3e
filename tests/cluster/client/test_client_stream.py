"""Both clients with requests and replies above the message limit: which way they go, their copies, their retries."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from helpers import copies
from helpers.front import TOKEN, Front, opened
from helpers.waiting import run_async, until

from expertmesh.cluster.client.calls import Calls
from expertmesh.cluster.client.client import AsyncClient, Client
from expertmesh.cluster.client.retry import Answer, Attempt, RetryPolicy, Step, drive
from expertmesh.cluster.gateway.streams import StreamLimits
from expertmesh.cluster.rpc.streams import ADMITTED, Streamed
from expertmesh.experts import wire
from expertmesh.experts.errors import DataLoss, DeadlineExceeded, InvalidRequest, Overloaded, TooLarge, Unavailable
from expertmesh.experts.spec import Expert

MIB = 2**20
KIB64 = 64 * 1024
X = np.arange(KIB64, dtype=np.float32).reshape(64, 1024) - 7  # 256 KiB
QUICK = RetryPolicy(first_pause=0.001, longest_pause=0.002)


class Both:
    """The blocking client in threads, or the asyncio one: `call` awaits either."""

    def __init__(self, made: Client | AsyncClient) -> None:
        self._made = made

    async def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        call = getattr(self._made, method)
        if isinstance(self._made, AsyncClient):
            return await call(*args, **options)
        return await asyncio.to_thread(call, *args, **options)


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> type:
    made: type = request.param
    return made


def client_of(kind: type, front: Front, **options: Any) -> Both:
    return Both(kind(front.endpoint, token=TOKEN, retry=QUICK, **options))


def test_small_goes_in_one_message_and_large_in_chunks_by_itself(kind: type) -> None:
    async def main() -> None:
        async with opened(max_message_bytes=MIB) as front:
            client = client_of(kind, front, max_message_bytes=MIB)
            seen: list[int] = []
            serve = front.gateway.streams.serve

            async def noted(*arguments: Any) -> None:
                seen.append(1)
                await serve(*arguments)

            front.gateway.streams.serve = noted  # type: ignore[method-assign]
            for x, streams in ((X[:32], 0), (X, 1), (np.tile(X, (20, 1)), 1)):
                for given in (x, torch.from_numpy(x)):
                    seen.clear()
                    y = await client("forward", "l", given)
                    assert (type(y), len(seen)) == (type(given), streams)
                    np.testing.assert_array_equal(np.asarray(y), np.abs(x))
                    y[0] = 1
            for wanted in (True, False):
                seen.clear()
                np.testing.assert_array_equal(await client("forward", "l", X, stream=wanted), np.abs(X))
                assert len(seen) == wanted
            await client("close")

    run_async(main())


@pytest.mark.slow
def test_100_mebibytes_cross_with_default_settings(kind: type) -> None:
    async def main() -> None:
        async with opened() as front:
            client = client_of(kind, front)
            x = np.ones((25, MIB), np.float32)
            x[:, -1] = np.arange(25) - 30
            reply = await client("call", "l", x, return_routing=True, request_id="large-1")
            np.testing.assert_array_equal(reply.output, np.abs(x))
            assert (reply.request_id, reply.indices.shape) == ("large-1", (25, 1))
            await client("close")

    run_async(main())


def test_a_stream_is_tried_again_when_it_was_unavailable_and_only_then(kind: type) -> None:
    async def main() -> None:
        async with opened() as front:
            client = client_of(kind, front)
            errors: list[Exception] = []
            answered = front.mesh.router.forward

            async def refuse(request: Any) -> Any:
                if errors:
                    raise errors.pop()
                return await answered(request)

            front.mesh.router.forward = refuse  # type: ignore[method-assign]
            errors += [Unavailable("an expert restarts"), Unavailable("an expert restarts")]
            np.testing.assert_array_equal(await client("forward", "l", X, stream=True), np.abs(X))
            assert errors == []
            errors += [Overloaded("too much")] * 2
            with pytest.raises(Overloaded) as caught:
                await client("forward", "l", X, stream=True, request_id="mine")
            assert (len(errors), caught.value.request_id) == (1, "mine")
            await client("close")

    run_async(main())


def test_limits_of_this_end_and_of_the_other_name_the_setting(kind: type) -> None:
    async def main() -> None:
        limits = StreamLimits(max_request_bytes=4 * MIB, max_stream_bytes=4 * MIB)
        async with opened(Expert.from_function(lambda rows: rows.repeat(1, 3)), limits) as front:
            client = client_of(kind, front, max_request_bytes=8 * MIB)
            x = np.ones((1024, 1024), np.float32)
            with pytest.raises(TooLarge, match="max_request_bytes of this client is 8388608"):
                await client("forward", "l", np.tile(x, (2, 1)), stream=True)
            with pytest.raises(TooLarge, match=r"the request has .* max_request_bytes of this cluster is 4194304"):
                await client("forward", "l", x, stream=True)
            with pytest.raises(TooLarge, match=r"the reply has .* max_request_bytes of this cluster is 4194304"):
                await client("forward", "l", x[:512], stream=True)
            half = client_of(kind, front, max_request_bytes=2 * MIB)
            with pytest.raises(TooLarge, match=r"the reply has .* max_request_bytes of this client is 2097152"):
                await half("forward", "l", x[:256], stream=True)
            await client("close")
            await half("close")
            await until(lambda: not len(front.gateway.streams))

    run_async(main())


def test_the_deadline_holds_for_a_stream(kind: type) -> None:
    async def main() -> None:
        async with opened() as front:
            front.hold = asyncio.Event()
            client = client_of(kind, front)
            with pytest.raises(DeadlineExceeded):
                await client("forward", "l", X, stream=True, timeout=0.2)
            await until(lambda: not front.inside and not len(front.gateway.streams))
            await client("close")

    run_async(main())


def test_a_server_that_goes_away_in_the_middle_is_unavailable(kind: type) -> None:
    async def main() -> None:
        async with opened() as front:
            client = client_of(kind, front)
            front.hold = asyncio.Event()
            call = asyncio.ensure_future(client("forward", "l", X, stream=True))
            await until(lambda: front.inside)
            await front.server.stop()
            with pytest.raises(Unavailable):
                await call
            await client("close")

    run_async(main())


def test_a_server_that_goes_away_while_it_receives_is_unavailable(kind: type) -> None:
    async def main() -> None:
        async with opened() as front:
            client = client_of(kind, front)
            streams, arrived = front.gateway.streams, 0
            read = streams._read

            async def slow(*given: Any) -> bytes | None:
                nonlocal arrived
                arrived += 1
                await asyncio.sleep(100 if arrived == 4 else 0)
                return await read(*given)

            streams._read = slow  # type: ignore[method-assign]
            call = asyncio.ensure_future(client("forward", "l", np.ones((64, MIB // 4), np.float32)))
            await until(lambda: arrived == 4)
            await front.server.stop()
            with pytest.raises(Unavailable):
                await call
            assert len(streams) == 0
            await client("close")

    run_async(main())


def test_a_cancelled_task_ends_its_stream() -> None:
    async def main() -> None:
        async with opened() as front, front.client() as client:
            front.hold = asyncio.Event()
            call = asyncio.ensure_future(client.forward("l", np.ones((32, MIB), np.float32)))
            await until(lambda: len(front.gateway.streams))
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until(lambda: not len(front.gateway.streams))

    run_async(main())


class BadReplies(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc has no types
    """A server whose streams are what a test says."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def answer(requests: Any, context: Any) -> None:
            await context.send_initial_metadata((ADMITTED,))
            async for _ in requests:
                pass
            for message in self.messages:
                await context.write(message)

        return grpc.stream_stream_rpc_method_handler(answer)


def test_a_reply_that_is_none_is_data_loss(kind: type) -> None:
    async def main() -> None:
        handler = BadReplies()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = Both(kind(f"127.0.0.1:{port}", token="t", retry=QUICK))
        good = list(Streamed([b"x" * 100]).messages())
        for messages in ([], [b"<html>"], good[:1], good, [good[0], b""], [*good, b"x"]):
            handler.messages = messages
            with pytest.raises(DataLoss) as caught:
                await client("forward", "l", X, stream=True, timeout=5.0)
            assert caught.value.request_id
        await client("close")
        await server.stop(None)

    run_async(main())


# half the bytes


@pytest.mark.parametrize("payload", ["float16", "bfloat16"])
def test_rows_cross_in_half_the_bytes_and_come_back_as_they_were(kind: type, payload: str) -> None:
    async def main() -> None:
        async with opened() as front:
            client = client_of(kind, front, payload_dtype=payload)
            x = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
            rounded = torch.from_numpy(x).to(getattr(torch, payload)).float().abs().numpy()
            for stream in (False, True):
                y = await client("forward", "l", x, stream=stream)
                assert (y.dtype, y.flags.writeable) == (np.float32, True)
                np.testing.assert_array_equal(y, rounded)
                z = await client("forward", "l", torch.from_numpy(x), stream=stream)
                assert z.dtype == torch.float32
                np.testing.assert_array_equal(z.numpy(), rounded)
            np.testing.assert_array_equal(await client("forward", "l", x, payload_dtype="float32"), np.abs(x))
            with pytest.raises(InvalidRequest, match="x is int64"):
                await client("forward", "l", np.ones((2, 2), np.int64))
            assert (await client("forward", "l", -np.ones((2, 2), np.int64), payload_dtype="float32")).min() == 1
            with pytest.raises(InvalidRequest, match="payload_dtype must be one of"):
                await client("forward", "l", x, payload_dtype="int8")
            await client("close")
            plain = client_of(kind, front)
            np.testing.assert_array_equal(await plain("forward", "l", x, payload_dtype=payload), rounded)
            await plain("close")

    run_async(main())


def test_what_is_sent_is_the_half() -> None:
    sent: list[wire.Frame] = []

    def perform(step: Step) -> Answer:
        assert isinstance(step, Attempt)
        assert isinstance(step.payload, bytes)
        sent.append(wire.decode(step.payload))
        meta = {"request_id": "r", "epoch": 1, "versions": {}}
        return wire.encode("reply", meta, {"output": sent[-1].tensors["x"]})

    calls = Calls(token="t", payload_dtype="bfloat16")
    weights, index = np.ones((64, 1), np.float32), np.zeros((64, 1), np.int64)
    drive(calls.call("l", X, gate_input=X, top_k_index=index, top_k_weights=weights), perform)
    dtypes = {name: tensor.dtype for name, tensor in sent[0].tensors.items()}
    assert dtypes == {"x": "bfloat16", "gate_input": "bfloat16", "top_k_index": "int64", "top_k_weights": "float32"}
    assert sent[0].tensors["x"].nbytes == X.nbytes // 2


# copies


def test_a_large_call_holds_the_copies_that_can_be_named() -> None:
    found = copies.measured()
    # One message: the request joined, and gRPC's reply; then the reply, and the answer out of it.
    # In chunks: the reply in one buffer, and the answer out of it; beside them a chunk that is cut and the one before.
    assert found["message"] == [pytest.approx(2.0, abs=0.02), pytest.approx(1.0, abs=0.01)]
    assert found["stream"] == [pytest.approx(2.0, abs=0.2), pytest.approx(1.0, abs=0.01)]
    assert found["put together"] == [pytest.approx(1.1, abs=0.1), pytest.approx(1.0, abs=0.01)]

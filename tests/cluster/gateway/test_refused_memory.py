"""What was refused is let go of at once, without a garbage collection: there may be none for minutes."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from helpers.front import METADATA, Front, opened, raw_stream
from helpers.waiting import run_async, until

from expertmesh.cluster.gateway.streams import StreamLimits
from expertmesh.cluster.rpc.methods import SERVICE
from expertmesh.cluster.rpc.streams import Streamed
from expertmesh.experts import wire
from expertmesh.experts.spec import Expert

MIB = 2**20


def breaks(rows: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError(f"{rows.shape}")


def frame(shape: tuple[int, ...] = (256, 4096), **meta: Any) -> bytes:
    x = wire.WireTensor.from_numpy(np.zeros(shape, np.float32))
    return wire.encode("call", {"layer": "l"} | meta, {"x": x})


REFUSED: dict[str, tuple[bytes, float, str]] = {
    "no frame": (bytes(4 * MIB), 20.0, "INVALID_ARGUMENT"),
    "cut short": (frame()[: 3 * MIB], 20.0, "DATA_LOSS"),
    "an unknown layer": (frame(layer="none"), 20.0, "NOT_FOUND"),
    "an unknown expert": (frame(allow=["l/none"]), 20.0, "INVALID_ARGUMENT"),
    "an epoch that was never": (frame(epoch=7), 20.0, "FAILED_PRECONDITION"),
    "rows that the expert refuses": (frame(), 20.0, "INTERNAL"),
}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collection; nor logging, because pytest keeps the records, and they keep the error."""
    gc.collect()
    gc.disable()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


async def refusal(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_stream_is_let_go_of(case: str, monkeypatch: pytest.MonkeyPatch, uncollected: None) -> None:
    message, timeout, code = REFUSED[case]
    empty, buffers = np.empty, []

    def noted(*arguments: Any, **options: Any) -> np.ndarray[Any, Any]:
        array = empty(*arguments, **options)
        if array.nbytes == len(message):
            buffers.append(weakref.ref(array))
        return array

    monkeypatch.setattr(np, "empty", noted)

    async def ask(front: Front, channel: Any) -> str:
        stream = raw_stream(channel, timeout)
        for part in Streamed([message]).messages():
            await stream.write(part)
        await stream.done_writing()
        return await refusal(stream.read())

    async def main() -> None:
        async with opened(Expert.from_function(breaks)) as front, front.channel() as channel:
            for _ in range(3):
                assert await ask(front, channel) == code
            await until(lambda: not len(front.gateway.streams))
            await until(lambda: len(buffers) == 3 and not any(buffer() is not None for buffer in buffers))

    run_async(main())


def test_an_answered_request_is_let_go_of_too(monkeypatch: pytest.MonkeyPatch, uncollected: None) -> None:
    copied: list[weakref.ref[Any]] = []

    async def main() -> None:
        async with opened() as front:
            forward = front.mesh.router.forward

            async def noted(request: Any) -> Any:
                copied.append(weakref.ref(request.x))
                return await forward(request)

            monkeypatch.setattr(front.mesh.router, "forward", noted)
            async with front.client() as client:
                for _ in range(3):
                    await client.forward("l", np.ones((4, 3), np.float32))
            await until(lambda: len(copied) == 3 and not any(rows() is not None for rows in copied))

    run_async(main())


@pytest.mark.parametrize("case", REFUSED)
def test_refused_messages_do_not_add_up(case: str, uncollected: None) -> None:
    message, timeout, code = REFUSED[case]
    memory = psutil.Process(os.getpid()).memory_info

    async def main() -> None:
        async with opened(Expert.from_function(breaks)) as front, front.channel() as channel:
            call: Callable[..., Any] = channel.unary_unary(f"/{SERVICE}/Call")
            for number in range(30):
                assert await refusal(call(message, metadata=METADATA, timeout=timeout)) == code
                if number == 5:
                    before = memory().rss
            assert memory().rss - before < 12 * 4 * MIB  # of 24 messages

    run_async(main())


def test_a_stream_that_comes_too_late_is_let_go_of(monkeypatch: pytest.MonkeyPatch, uncollected: None) -> None:
    async def main() -> None:
        limits = StreamLimits(stall_seconds=0.05)
        async with opened(limits=limits) as front, front.channel() as channel:
            stream = raw_stream(channel)
            for part in list(Streamed([frame()]).messages())[:3]:
                await stream.write(part)
            assert await refusal(stream.read()) == "DEADLINE_EXCEEDED"
            await until(lambda: front.gateway.streams.reserved == 0)

    run_async(main())

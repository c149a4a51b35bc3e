"""Many calls at once over one connection: they overlap, share it, and are cancelled one by one."""

from __future__ import annotations

import asyncio

import numpy as np
import psutil
import pytest
from helpers.front import TOKEN, Front, opened
from helpers.waiting import run_async, until

from expertmesh.cluster.client.client import Client
from expertmesh.experts.errors import DeadlineExceeded

X = np.arange(-8, 8, dtype=np.float32).reshape(4, 4)


def connections(front: Front) -> set[int]:
    """The local ports of connections of this process to the gateway."""
    found = psutil.Process().net_connections("tcp")
    return {c.laddr.port for c in found if c.raddr and c.raddr.port == front.server.port}


def test_64_calls_of_1_mebibyte_are_inside_at_once_over_one_connection() -> None:
    async def main() -> None:
        async with opened() as front, front.client() as client:
            front.hold = asyncio.Event()
            rows = [np.full((256, 1024), -n, np.float32) for n in range(64)]
            calls = asyncio.gather(*(client.forward("l", x) for x in rows))
            await until(lambda: front.inside == 64)  # none has been answered: all of them have arrived
            assert front.answered == 0
            assert len(connections(front)) == 1
            front.hold.set()
            for n, y in enumerate(await calls):
                assert (y.min(), y.max()) == (n, n)
            assert front.most_inside == 64

    run_async(main())


@pytest.mark.slow
def test_1000_calls_take_one_connection() -> None:
    async def main() -> None:
        async with opened() as front, front.client() as client:
            await client.forward("l", X)
            first = connections(front)
            for _ in range(10):
                await asyncio.gather(*(client.forward("l", X) for _ in range(98)))
                await asyncio.gather(*(client.forward("l", X, stream=True) for _ in range(2)))
            assert connections(front) == first
            assert len(first) == 1
            assert front.answered == 1001

    run_async(main())


def test_threads_share_the_one_connection_of_a_blocking_client() -> None:
    async def main() -> None:
        async with opened() as front:
            with Client(front.endpoint, token=TOKEN) as client:
                await asyncio.to_thread(client.forward, "l", X)
                first = connections(front)
                front.hold = asyncio.Event()
                calls = [asyncio.to_thread(client.forward, "l", X, stream=n % 2 == 0) for n in range(4)]
                waiting = asyncio.gather(*calls)
                await until(lambda: front.inside == 4)
                front.hold.set()
                await waiting
                assert connections(front) == first
                assert len(first) == 1

    run_async(main())


@pytest.mark.parametrize("stream", [False, True])
def test_one_of_many_is_cancelled_and_the_others_are_answered(stream: bool) -> None:
    async def main() -> None:
        async with opened() as front, front.client() as client:
            front.hold = asyncio.Event()
            calls = [asyncio.ensure_future(client.forward("l", X - n, stream=stream)) for n in range(20)]
            await until(lambda: front.inside == 20)
            for call in calls[::2]:
                call.cancel()
            await until(lambda: front.inside == 10)  # the server has dropped them before they were computed
            front.hold.set()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False] * 10
            for n in range(1, 20, 2):
                np.testing.assert_array_equal(results[n], np.abs(X - n))
            assert front.answered == 10
            assert len(connections(front)) == 1

    run_async(main())


def test_the_first_error_of_a_gather_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with opened() as front:
            async with front.client() as client:
                front.hold = asyncio.Event()
                calls = [client.forward("l", X, stream=n % 2 == 0) for n in range(10)]
                all_of_them = asyncio.gather(*calls, client.forward("l", X, timeout=0.1))
                with pytest.raises(DeadlineExceeded):
                    await all_of_them
                assert front.inside >= 10
            await until(lambda: front.inside == 0)  # closing the client has ended the others
            await until(lambda: len(front.gateway.streams) == 0)

    run_async(main())

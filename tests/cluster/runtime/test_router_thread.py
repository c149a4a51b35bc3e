"""A router's thread that is asked while it ends: everybody gets an answer or an error, and no task is forgotten."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers.waiting import eventually, run_async

from expertmesh import Client, Cluster, Expert, ExpertMeshError, Layer, gates
from expertmesh.cluster.runtime.router_thread import RouterThread
from expertmesh.experts.errors import Unavailable
from expertmesh.router.fanout.transport import LocalTransport
from expertmesh.router.request.forward import Router

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
CALLERS = 4


@contextmanager
def nothing_forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails where a coroutine was never awaited, or a task was destroyed before its end."""
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING, logger="asyncio"):
        warnings.simplefilter("always")
        yield
        gc.collect()
    texts = [str(warning.message) for warning in warned] + [record.getMessage() for record in caplog.records]
    assert not [
        text for text in texts if "never awaited" in text or "was destroyed" in text or "never retrieved" in text
    ]


def test_a_router_that_has_stopped_refuses_what_it_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        thread = RouterThread(Router(LocalTransport()))
        assert await thread.call(len, "abc") == 3
        thread.close()
        with pytest.raises(Unavailable, match="has stopped"):
            await thread.call(len, "abc")
        thread.close()

    with nothing_forgotten(caplog):
        run_async(main())


def test_who_asks_while_the_router_stops_does_not_wait_without_end(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        for _ in range(50):
            thread = RouterThread(Router(LocalTransport()))
            asked = [asyncio.ensure_future(thread.call(len, "abc")) for _ in range(20)]
            asked += [asyncio.ensure_future(thread.run(asyncio.sleep(100, 3)))]
            closing = threading.Thread(target=thread.close)
            closing.start()
            asked += [asyncio.ensure_future(thread.call(len, "abc")) for _ in range(20)]
            ended = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
            closing.join()
            assert all(end == 3 or isinstance(end, (Unavailable, asyncio.CancelledError)) for end in ended)

    with nothing_forgotten(caplog):
        run_async(main())


@pytest.mark.usefixtures("own_home")
def test_a_cluster_that_stops_in_the_middle_of_calls_forgets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def slow(rows: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return rows

    layer = Layer("l", gates.Fixed([1.0]), {"e": Expert.from_function(slow)})
    answered, ended = 0, []

    def calling(endpoint: str) -> None:
        nonlocal answered
        with Client(endpoint, timeout=10.0) as client:
            try:
                while True:
                    client.forward("l", np.ones((1, 2), np.float32))
                    answered += 1
            except ExpertMeshError as error:
                ended.append(error)

    with nothing_forgotten(caplog):
        cluster = Cluster.start([layer], transport="local", port=0, metrics_port=None, name="ends")
        callers = [threading.Thread(target=calling, args=(cluster.endpoint,)) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        eventually(lambda: answered > CALLERS, 60.0, "calls are answered")
        cluster.stop(grace=0.0)
        for caller in callers:
            caller.join(60.0)
        assert len(ended) == CALLERS

"""A router of this process with the methods of a client: calls cross to its thread as frames that nobody encodes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ...experts.errors import ExpertMeshError
from ...experts.wire import Frame, WireTensor
from ..client.calls import Calls
from ..client.methods import AwaitingMethods, BlockingMethods
from ..client.retry import Answer, Attempt, Flow, Pause, RetryPolicy, Step, Work
from ..client.routers.balance import Route
from ..client.sending import new_retries
from ..rpc.methods import SERVICE
from .engine import Engine

CALL = f"/{SERVICE}/Call"


class AttachedCalls(Calls):
    """The flows of a client whose router is in its own process."""

    def _call(
        self,
        meta: dict[str, Any],
        tensors: dict[str, WireTensor],
        stream: bool | None,
        timeout: float | None,
        route: Route,
    ) -> Flow[Frame]:
        """Hand the rows over where they are; no limit of a message applies."""
        frame = Frame("call", meta, tensors)
        return (yield from self._frame(CALL, frame, timeout, meta["request_id"], meta["layer"], route))

    def _trained(
        self, method: str, meta: dict[str, Any], tensors: dict[str, WireTensor], timeout: float | None
    ) -> Flow[Frame]:
        """Hand a message of training over as it is."""
        return (yield from self._frame(f"/{SERVICE}/{method}", Frame("train", meta, tensors), timeout, self.new_id()))

    def _frame(
        self,
        method: str,
        frame: Frame,
        timeout: float | None,
        request_id: str,
        layer: str = "",
        route: Route | None = None,
    ) -> Flow[Frame]:
        answer = yield from self._send(self.retries, method, frame, timeout, request_id, layer, route)
        if not isinstance(answer, Frame):
            raise ExpertMeshError("a router of this process answered with bytes")
        return answer


class AttachedRouter(BlockingMethods):
    """A router in this process, made by `expertmesh.attach`, with the methods of `Client`. Threads may share it.

    Rows go from here to the replicas directly: no gRPC, and no router in between. A call reads its arrays where they
    are, so do not change them before it has returned; an array that is not contiguous, or on a GPU, is copied first.
    The arrays of a reply are the caller's own: writable, and without memory that another reply, or the router, uses.
    `stream`, and the limits of messages, have no meaning here. `drain` and `leases` concern this router alone.

    `aio` has the same methods as coroutines, for any event loop.

    Example:
        with expertmesh.attach("news") as router:
            y = router.forward("news", x)
            reply = router.call("news", x, top_k=1)
            print(reply.output, reply.versions)
            z = await router.aio.forward("news", x)
    """

    def __init__(self, engine: Engine, *, timeout: float = 30.0, retry: RetryPolicy | None = None) -> None:
        """For `attach` alone, which says what `timeout` and `retry` are."""
        self._engine = engine
        self._calls = AttachedCalls(token=engine.token, timeout=timeout, retries=new_retries(retry or RetryPolicy()))
        self.aio = AsyncAttachedRouter(engine, self._calls)

    def __repr__(self) -> str:
        return f"AttachedRouter({self._engine.name!r}{', closed' if self._engine.closed else ''})"

    @property
    def name(self) -> str:
        """The name of this router as a member of the cluster."""
        return self._engine.name

    def close(self) -> None:
        """Leave the cluster; calls in flight fail with an error. Closing twice is harmless, and the exit closes."""
        self._engine.close()

    def __enter__(self) -> AttachedRouter:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _perform(self, step: Step) -> Answer:
        if isinstance(step, Attempt):
            return self._engine.answer(step)
        if isinstance(step, Work):
            return step.action()
        if isinstance(step, Pause):
            time.sleep(step.seconds)
        return None


class AsyncAttachedRouter(AwaitingMethods):
    """The methods of an `AttachedRouter` as coroutines: its `aio`, which is closed with it."""

    def __init__(self, engine: Engine, calls: Calls) -> None:
        """For `AttachedRouter` alone."""
        self._engine = engine
        self._calls = calls

    def __repr__(self) -> str:
        return f"AsyncAttachedRouter({self._engine.name!r}{', closed' if self._engine.closed else ''})"

    async def _perform(self, step: Step) -> Answer:
        if isinstance(step, Attempt):
            return await self._engine.answer_async(step)
        if isinstance(step, Work):
            return await asyncio.to_thread(step.action)
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
        return None

"""Runs a router in a thread of this process, hands it what callers ask, and has it follow the controller."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ...experts.errors import DeadlineExceeded, ExpertMeshError, FailedPrecondition, Unavailable
from ...experts.wire import Frame
from ...router.fanout.transport import Transport
from ..client.retry import Answer, Attempt
from ..control.messages import Desired
from ..control.ports import ControlPort
from ..gateway.gateway import TRAINING, CallInfo
from ..machine.tokens import new_token, token_digest
from ..rpc.methods import Role
from ..rpc.status import LAYER_KEY, REQUEST_ID_KEY
from ..runtime.router_process import RouterService, ServiceSettings
from .follower import Follower, Seat

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

LATE_SECONDS = 5.0
"""How long after its deadline a call may wait for a router whose thread does not run."""
CLOSE_SECONDS = 5.0
READY_SECONDS = 0.01
T = TypeVar("T")


class Connection(Protocol):
    """What a router in this process needs of the cluster that it joins; `settings` are those of its other routers.

    `where` says where it is, in the words of the status.
    """

    name: str
    where: Mapping[str, str]
    settings: ServiceSettings
    transport: Transport
    control: ControlPort
    seat: Seat

    def declared(self, desired: Desired) -> None:
        """Take the handles of what is declared."""

    def close(self) -> None:
        """Disconnect; idempotent."""


class Engine:
    """A router of this process. Its methods may be called from any thread, but not after a fork.

    Callers present `token`, which this process alone knows, because the gateway answers nobody without one.
    """

    def __init__(self, connection: Connection) -> None:
        self.name = connection.name
        self.token = new_token()
        self.closed = False
        self._connection = connection
        tokens = ((token_digest(self.token), Role.ADMIN, None),)
        here = connection.settings.state_dir is not None and Path(connection.settings.state_dir).is_dir()
        state_dir = connection.settings.state_dir if here else None
        settings = replace(connection.settings, router=self.name, tokens=tokens, state_dir=state_dir, attached=True)
        self._service = RouterService(settings, connection.transport, connection.control)
        self._service.where = connection.where
        self._follower = Follower(connection.seat, self.name, self._carry, self._is_fresh)
        self._following: asyncio.Task[None] | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()
        atexit.register(self.close)

    def start(self, timeout: float) -> None:
        """Join, and wait for the first epoch. Raises Unavailable after `timeout` seconds; then it is closed."""
        try:
            self._submit(self._start(timeout)).result(timeout + LATE_SECONDS)
        except BaseException:
            self.close()
            raise

    def answer(self, step: Attempt) -> Answer:
        """Answer a request, or return its error. Blocks."""
        future = self._submit(self._answered(step))
        try:
            return future.result(step.timeout + LATE_SECONDS)
        except (TookTooLong, TimeoutError):
            return _late(step)
        finally:
            future.cancel()  # late, or interrupted; it does nothing to a future that is done

    async def answer_async(self, step: Attempt) -> Answer:
        """Answer a request, or return its error; cancelling this cancels the request."""
        future = self._submit(self._answered(step))
        try:
            async with deadline(step.timeout + LATE_SECONDS):
                return await asyncio.wrap_future(future)
        except (asyncio.TimeoutError, TimeoutError):
            return _late(step)

    def close(self) -> None:
        """Fail the calls in flight, leave the cluster and end the thread; idempotent. A forked process does nothing."""
        if os.getpid() != self._process:
            return
        atexit.unregister(self.close)
        with self._lock:
            first, self.closed = not self.closed, True
        if not first:
            return
        loop = self._service.loop
        try:
            with suppress(TookTooLong, TimeoutError):
                asyncio.run_coroutine_threadsafe(self._leave(), loop).result(CLOSE_SECONDS)
        finally:
            self._service.close()
            self._connection.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the router's thread. Raises FailedPrecondition after a fork, or once it is closed."""
        if os.getpid() != self._process:
            work.close()
            raise FailedPrecondition(
                "this process was forked from one that had attached, whose connections it must not use: attach again "
                "here, or start it by spawning"
            )
        with self._lock:
            if self.closed:
                work.close()
                raise FailedPrecondition("this router is closed: attach again")
            return asyncio.run_coroutine_threadsafe(work, self._service.loop)

    async def _start(self, timeout: float) -> None:
        self._service.begin()
        self._following = asyncio.ensure_future(self._follower.run())
        end = time.monotonic() + timeout
        router = self._service.router
        while not (router.epochs.number and router.standing.kept):
            if time.monotonic() > end:
                raise Unavailable(
                    f"{self.name} was not brought up to date within {timeout:g} s: {self._follower.problem}"
                )
            await asyncio.sleep(READY_SECONDS)

    async def _leave(self) -> None:
        if self._following is not None:
            self._following.cancel()
        self._service.router.transport.close()  # what was pinned is of no use from here on
        await self._follower.leave()

    async def _answered(self, step: Attempt) -> Answer:
        """The answer to a request, or its error, in the router's thread."""
        named, method, gateway = dict(step.metadata), step.method.rpartition("/")[2], self._service.gateway
        request_id, layer = named[REQUEST_ID_KEY], named.get(LAYER_KEY, "")
        call = CallInfo(request_id=request_id, token=self.token, deadline=time.monotonic() + step.timeout, layer=layer)
        payload = step.payload

        async def read() -> Any:
            return payload

        try:
            if isinstance(payload, Frame) and method in TRAINING:
                return await gateway.trained(method, payload, gateway.authorise(method, self.token), call)
            if isinstance(payload, Frame):
                return await gateway.exchange(payload, call)
            return await gateway.unary(method, read, call)
        except asyncio.CancelledError:
            if not self.closed:
                raise
            return Unavailable("this router was closed")
        except ExpertMeshError as error:  # for the caller, whose process this is: it is not logged
            error.request_id = error.request_id or request_id
            return error
        except Exception as error:  # noqa: BLE001 (a bug: it is logged, as at the border to gRPC)
            return gateway.refusal(method, error, request_id)

    def _is_fresh(self) -> bool:
        return not self._service.router.epochs.number

    async def _carry(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Carry out an order of the controller."""
        service = self._service
        orders: dict[str, Callable[..., Awaitable[Any]]] = {
            "declare": service.declare, "sync": service.sync, "stage": service.stage, "unload": service.unload,
        }  # fmt: skip
        if method == "declare":
            self._connection.declared(*arguments)
        return await orders[method](*arguments)


def _late(step: Attempt) -> DeadlineExceeded:
    return DeadlineExceeded(f"the router of this process did not answer within {step.timeout:.3f} s: is it stopped?")

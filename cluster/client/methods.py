"""The methods of a client, blocking and as coroutines: the flows of calls.py, whose steps the client performs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from ...experts.errors import ExpertMeshError
from ..rpc.swaps import Lease
from .calls import Calls
from .retry import Answer, Flow, Step, drive, drive_async

P = ParamSpec("P")
T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


def _blocking(flow: Callable[Concatenate[Calls, P], Flow[T]]) -> Callable[Concatenate[BlockingMethods, P], T]:
    """Turn a flow of `Calls` into a method that blocks."""

    @functools.wraps(flow)
    def method(client: BlockingMethods, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return drive(flow(client._calls, *args, **kwargs), client._perform)

    return _described(method, flow)


def _awaiting(
    flow: Callable[Concatenate[Calls, P], Flow[T]],
) -> Callable[Concatenate[AwaitingMethods, P], Awaitable[T]]:
    """Turn a flow of `Calls` into a coroutine method."""

    @functools.wraps(flow)
    async def method(client: AwaitingMethods, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await drive_async(flow(client._calls, *args, **kwargs), client._perform)

    return _described(method, flow)


def _described(method: Method, flow: Callable[..., Flow[Any]]) -> Method:
    """The method with the signature of its flow, and the flow's result as its return type."""
    signature = inspect.signature(flow)
    result = str(signature.return_annotation).removeprefix("Flow[").removesuffix("]")
    vars(method)["__signature__"] = signature.replace(return_annotation=result)
    method.__annotations__ = {**flow.__annotations__, "return": result}
    return method


class BlockingMethods:
    """Methods that block until there is an answer."""

    _calls: Calls

    def _perform(self, step: Step) -> Answer:
        """Perform one step of a flow."""
        raise NotImplementedError

    forward = _blocking(Calls.forward)
    call = _blocking(Calls.call)
    status = _blocking(Calls.status)
    drain = _blocking(Calls.drain)
    health = _blocking(Calls.health)
    swap = _blocking(Calls.swap)
    rollback = _blocking(Calls.rollback)
    history = _blocking(Calls.history)
    declared = _blocking(Calls.declared)
    scale = _blocking(Calls.scale)
    add_expert = _blocking(Calls.add_expert)
    remove_expert = _blocking(Calls.remove_expert)
    add_layer = _blocking(Calls.add_layer)
    remove_layer = _blocking(Calls.remove_layer)
    change_layers = _blocking(Calls.change_layers)
    swap_progress = _blocking(Calls.swap_progress)
    leases = _blocking(Calls.leases)
    end_lease = _blocking(Calls.end_lease)

    @contextmanager
    def pin(self, ttl: float = 30.0) -> Iterator[Lease]:
        """Lease the current epoch for several calls: `with client.pin() as lease: client.call("news", x, pin=lease)`.

        The lease ends with the block, `ttl` seconds (at most 60) after its last use, or 10 seconds after a swap has
        replaced the epoch. Raises the errors of a call.
        """
        lease = drive(self._calls.lease(ttl), self._perform)
        try:
            yield lease
        finally:
            with suppress(ExpertMeshError):  # it expires anyway
                drive(self._calls.give_back(lease), self._perform)


class AwaitingMethods:
    """The same methods as coroutines."""

    _calls: Calls

    async def _perform(self, step: Step) -> Answer:
        """Perform one step of a flow."""
        raise NotImplementedError

    forward = _awaiting(Calls.forward)
    call = _awaiting(Calls.call)
    status = _awaiting(Calls.status)
    drain = _awaiting(Calls.drain)
    health = _awaiting(Calls.health)
    swap = _awaiting(Calls.swap)
    rollback = _awaiting(Calls.rollback)
    history = _awaiting(Calls.history)
    declared = _awaiting(Calls.declared)
    scale = _awaiting(Calls.scale)
    add_expert = _awaiting(Calls.add_expert)
    remove_expert = _awaiting(Calls.remove_expert)
    add_layer = _awaiting(Calls.add_layer)
    remove_layer = _awaiting(Calls.remove_layer)
    change_layers = _awaiting(Calls.change_layers)
    swap_progress = _awaiting(Calls.swap_progress)
    leases = _awaiting(Calls.leases)
    end_lease = _awaiting(Calls.end_lease)

    @asynccontextmanager
    async def pin(self, ttl: float = 30.0) -> AsyncIterator[Lease]:
        """Lease the current epoch for several calls, as `Client.pin` does: `async with client.pin() as lease: ...`."""
        lease = await drive_async(self._calls.lease(ttl), self._perform)
        try:
            yield lease
        finally:
            with suppress(ExpertMeshError):  # it expires anyway
                await drive_async(self._calls.give_back(lease), self._perform)

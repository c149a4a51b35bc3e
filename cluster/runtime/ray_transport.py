"""Sends rows through Ray's actor calls: the portable transport, and the baseline of the direct channel."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...experts.errors import ExpertMeshError, FailedPrecondition, Fenced, Unavailable
from ...experts.protocol import ExpertCall, ExpertReply, TrainCall
from ...experts.tensors import from_bytes
from ...router.fanout.replica_view import Replica
from ...router.fanout.transport import Cancel, Died, Done, Lost, Trained, in_task
from ..channel.router_end import ChannelTransport
from ..channel.settings import ChannelSettings
from .ray_ports import actor_ended, awaited, pack

RESPONDS_SECONDS = 0.5


class RayTransport:
    """Sends messages as actor calls, tensors as bytes, which Ray does not copy."""

    def __init__(self) -> None:
        self.carried: Counter[str] = Counter()
        self.handles: dict[str, Any] = {}
        self._router = ""
        self._refused: Callable[[], None] = lambda: None

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Call the actor."""
        return in_task(self._exchange(replica, call), done)

    def train(self, replica: Replica, call: TrainCall, done: Trained) -> Cancel:
        """Refuse: nobody trains over the baseline of the benchmarks."""
        error = FailedPrecondition("training needs `transport: channel`, the default")
        return asyncio.get_running_loop().call_soon(done, error).cancel

    async def _exchange(self, replica: Replica, call: ExpertCall) -> ExpertReply | Died:
        handle = self.handles.get(replica.id)
        if handle is None:
            raise Unavailable("the replica is gone; retry")
        self.carried["ray"] += int(call.rows.shape[0])
        tensors = {"rows": call.rows, "row_index": call.row_index, "weights": call.weights}
        packed = replace(call, **{name: _packed(tensor) for name, tensor in tensors.items()})
        router, refused = self._router, self._refused
        try:
            return _each(_unpacked, await awaited(handle.compute.remote(packed, router)))
        except Fenced:
            if router == self._router:
                refused()
            raise Unavailable("this router was given up; retry") from None
        except Unavailable as error:
            if actor_ended(error):
                return Died()
            raise

    def identify(self, router: str, refused: Callable[[], None]) -> None:
        """Send as this router from now on."""
        self._router, self._refused = router, refused

    async def responds(self, replica: Replica) -> bool:
        """Whether the actor answers in its group for control, while it may compute."""
        return await responds(self.handles.get(replica.id))

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Does nothing: Ray connects to its actors."""

    def close(self) -> None:
        """Does nothing: there is no connection to close."""


class Actors:
    """The actors of the replicas by id, as declared last, and the transport that carries rows to them from `node`.

    That is the direct channel, or Ray's calls where it has no settings.
    """

    def __init__(self, channel: ChannelSettings | None, node: str) -> None:
        self._by_calls = RayTransport()
        self.transport: RayTransport | ChannelTransport = self._by_calls
        if channel is not None:
            self.transport = ChannelTransport(channel.secret, self._responds, node=node)

    def declared(self, handles: Mapping[str, Any]) -> None:
        """Take the actors of newer declared layers."""
        self._by_calls.handles = dict(handles)

    async def _responds(self, replica_id: str) -> bool:
        return await responds(self._by_calls.handles.get(replica_id))


async def responds(actor: Any) -> bool:
    """Whether the actor of a replica, if there is one, answers a call that is not behind its computations."""
    try:
        return actor is not None and bool(await asyncio.wait_for(awaited(actor.report.remote()), RESPONDS_SECONDS))
    except (ExpertMeshError, asyncio.TimeoutError, TimeoutError):
        return False


def unpacked_call(call: ExpertCall) -> ExpertCall:
    """Unpack a call for the host; rows without an index are copied, as experts may write to them, but not to Ray's."""
    rows, index = from_bytes(*call.rows), _unpacked(call.row_index)
    return replace(call, rows=rows.clone() if index is None else rows, row_index=index, weights=_unpacked(call.weights))


def packed_reply(reply: ExpertReply) -> ExpertReply:
    """Pack a reply for Ray."""
    return _each(_packed, reply)


def _each(change: Callable[[Any], Any], reply: ExpertReply) -> ExpertReply:
    outputs, sums = (tuple(map(change, rows)) for rows in (reply.outputs, reply.sums))
    return replace(reply, outputs=outputs, sums=sums, lost=change(reply.lost))


def _packed(output: Any) -> Any:
    return pack(output) if isinstance(output, Tensor) else output


def _unpacked(output: Any) -> Any:
    return from_bytes(*output) if isinstance(output, tuple) else output

"""Rows through Ray's actor calls: the portable transport, and the baseline of the direct channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...experts.errors import Unavailable
from ...experts.protocol import ExpertCall, ExpertReply
from ...experts.tensors import from_bytes
from ...router.fanout.replica_view import Replica
from ...router.fanout.transport import Cancel, Done, Lost, in_task
from .ray_ports import awaited, pack


class RayTransport:
    """Carries messages as actor calls; tensors go as bytes, which Ray does not copy."""

    def __init__(self) -> None:
        self.carried: Counter[str] = Counter()
        self.handles: dict[str, Any] = {}

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Call the actor."""
        return in_task(self._exchange(replica, call), done)

    async def _exchange(self, replica: Replica, call: ExpertCall) -> ExpertReply:
        handle = self.handles.get(replica.id)
        if handle is None:
            raise Unavailable("the replica is gone; retry")
        self.carried["ray"] += int(call.rows.shape[0])
        return _unpacked_reply(await awaited(handle.compute.remote(_packed_call(call))))

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Nothing to connect: Ray knows where its actors are."""

    def close(self) -> None:
        """Nothing to let go."""


def _packed_call(call: ExpertCall) -> ExpertCall:
    return replace(
        call,
        rows=pack(call.rows),
        row_index=None if call.row_index is None else pack(call.row_index),
        weights=None if call.weights is None else pack(call.weights),
    )


def unpacked_call(call: ExpertCall) -> ExpertCall:
    """The call as the host takes it. Ray's memory cannot be written to, and an expert may write into its rows."""
    return replace(
        call,
        rows=from_bytes(*call.rows).clone() if call.row_index is None else from_bytes(*call.rows),
        row_index=None if call.row_index is None else from_bytes(*call.row_index),
        weights=None if call.weights is None else from_bytes(*call.weights),
    )


def packed_reply(reply: ExpertReply) -> ExpertReply:
    """The reply as Ray carries it."""
    return replace(
        reply,
        outputs=tuple(_packed(output) for output in reply.outputs),
        sums=tuple(_packed(total) for total in reply.sums),
        lost=_packed(reply.lost),
    )


def _unpacked_reply(reply: ExpertReply) -> ExpertReply:
    return replace(
        reply,
        outputs=tuple(_unpacked(output) for output in reply.outputs),
        sums=tuple(_unpacked(total) for total in reply.sums),
        lost=_unpacked(reply.lost),
    )


def _packed(output: Any) -> Any:
    return pack(output) if isinstance(output, Tensor) else output


def _unpacked(output: Any) -> Any:
    return from_bytes(*output) if isinstance(output, tuple) else output

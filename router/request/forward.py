"""One request from its rows to its answer: admit, pin an epoch, gate, fan out, wait, combine.

Shapes: T rows of the request, E experts, K choices a row, N pairs of the batch that carries it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from ...experts.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    NotFound,
    Unavailable,
    VersionGone,
)
from ..epochs.epochs import Epoch, Epochs
from ..epochs.leases import Leases
from ..epochs.pinning import Pinning, fixed_epoch_gone
from ..fanout.fanout import Fanout
from ..fanout.replica_view import Replica, View
from ..fanout.telemetry import Telemetry
from ..fanout.transport import Transport
from ..mixture.layer import Layer
from .admission import Admission
from .answer import Answer, ForwardReply, ForwardRequest
from .gating import Gating
from .options import gate_request

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

EPOCH_ATTEMPTS = 2


class Router:
    """Serves forward requests over the layers of the current epoch. It knows no Ray and no socket."""

    def __init__(self, transport: Transport, *, max_rows_in_flight: int = 65_536) -> None:
        self.epochs = Epochs()
        self.leases = Leases(self.epochs, time.monotonic)
        self.pinning = Pinning(self.epochs, self.leases)
        self.view = View()
        self.telemetry = Telemetry()
        self.admission = Admission(max_rows_in_flight)
        self.transport = transport
        self.fanout = Fanout(transport, self.view, self.telemetry)
        self._gating = Gating(self.fanout)

    def adopt(self, epoch: Epoch) -> bool:
        """Make an epoch the current one; requests under way keep theirs."""
        newer = self.epochs.adopt(epoch)
        if newer:
            self.pinning.adopted()
        return newer

    def update_view(self, replicas: Sequence[Replica]) -> None:
        """Take a full report of the replicas."""
        self.view.update(replicas)
        self.transport.refresh(self.view.replicas(), self._lost)
        self.fanout.refresh()

    def _lost(self, replica: Replica) -> None:
        if any(known.incarnation == replica.incarnation for known in self.view.replicas()):
            self.view.failed(replica.id)

    async def forward(self, request: ForwardRequest) -> ForwardReply:
        """Answer one request.

        Raises NotFound, InvalidRequest, SpecMismatch, Overloaded, TooLarge, Unavailable, ExpertFailed, for an epoch
        that the caller has fixed FailedPrecondition or, when `timeout` has passed, DeadlineExceeded.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        name, code = "", ExpertMeshError.code  # only the names of layers are counted: there are few of them
        try:
            name = self.layer(request.options.layer).name
            with self.admission.admit(name, int(request.x.shape[0]) if request.x.ndim else 1):
                async with timeout(request.timeout):  # a wait_for would be a task of its own: four turns of the loop
                    reply = await self._on_some_epoch(request, started + request.timeout)
            code = "OK"
            return reply
        except (asyncio.TimeoutError, TimeoutError):
            code = DeadlineExceeded.code
            raise DeadlineExceeded(f"layer {name} did not answer within {request.timeout:.3f} s") from None
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except ExpertMeshError as error:
            code = error.code
            raise
        finally:
            self.telemetry.count_request(name, code, loop.time() - started)

    def layer(self, name: str) -> Layer:
        """A layer of the current epoch by its name. Raises NotFound."""
        return _layer(self.epochs.current, name)

    async def _on_some_epoch(self, request: ForwardRequest, deadline: float) -> ForwardReply:
        options = request.options
        fixed = options.epoch is not None or options.pin is not None
        for attempt in range(1, EPOCH_ATTEMPTS + 1):
            epoch = await self.pinning.pin(options, request.timeout)
            try:
                return await self._on_epoch(request, epoch, deadline)
            except VersionGone as error:  # unloaded in the meantime
                if attempt == EPOCH_ATTEMPTS:
                    raise fixed_epoch_gone(options, error) if fixed else error from None
                if fixed:  # no other epoch will do; otherwise once more from the gate, on the current one
                    await self.pinning.fetch(epoch.number)
            finally:
                self.epochs.unpin(epoch)
        raise Unavailable("unreachable")

    async def _on_epoch(self, request: ForwardRequest, epoch: Epoch, deadline: float) -> ForwardReply:
        layer = _layer(epoch, request.options.layer)
        asked = gate_request(layer, request.x, request.options, request.features, request.indices, request.weights)
        asked = replace(asked, deadline=deadline, client=request.client)
        routed = await self._gating.route(epoch, layer, asked)
        try:
            return await Answer(self.fanout, request, asked, routed).complete()
        finally:
            routed.batch.release()


def _layer(epoch: Epoch, name: str) -> Layer:
    if name not in epoch.layers:
        raise NotFound(f"there is no layer {name[:64]!r}; known are {', '.join(sorted(epoch.layers)[:20])}")
    return epoch.layers[name]  # type: ignore[no-any-return]

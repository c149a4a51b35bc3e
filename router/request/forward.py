"""One request from rows to reply: admit, pin an epoch, gate, fan out, wait, combine.

Shapes: T rows of the request, E experts, K choices per row, N pairs of the batch that carries it.
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
from ...experts.protocol import CallOptions
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
from .batching import Batching
from .options import gate_request
from .standing import Standing

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout

EPOCH_ATTEMPTS = 2


class Router:
    """Serves forward requests on the layers of its epochs. It depends on neither Ray nor sockets."""

    def __init__(self, transport: Transport, *, max_rows_in_flight: int = 65_536) -> None:
        self.epochs = Epochs()
        self.standing = Standing()
        self.leases = Leases(self.epochs, time.monotonic, check=self.standing.check)
        self.pinning = Pinning(self.epochs, self.leases)
        self.view = View()
        self.telemetry = Telemetry()
        self.admission = Admission(max_rows_in_flight)
        self.transport = transport
        self.fanout = Fanout(transport, self.view, self.telemetry)
        self._batching = Batching(self.fanout)

    def adopt(self, epoch: Epoch) -> bool:
        """Make an epoch the current one; requests in flight keep theirs. Returns False if it is not newer."""
        newer = self.epochs.adopt(epoch)
        if newer:
            self.pinning.adopted()
        return newer

    def update_view(self, replicas: Sequence[Replica]) -> None:
        """Apply a full report of the replicas."""
        self.view.update(replicas)
        self.transport.refresh(self.view.replicas(), self._replica_lost)
        self.fanout.refresh()

    def _replica_lost(self, replica: Replica) -> None:
        if any(current.incarnation == replica.incarnation for current in self.view.replicas()):
            self.view.failed(replica.id)

    async def forward(self, request: ForwardRequest) -> ForwardReply:
        """Answer one request.

        Raises NotFound, InvalidRequest, SpecMismatch, Overloaded, TooLarge, Unavailable, ExpertFailed, DataLoss,
        VersionGone if no replica holds the versions of the epoch, FailedPrecondition for a lease that has ended or an
        epoch that is not kept, and DeadlineExceeded after `request.timeout`.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        name, code = "", ExpertMeshError.code  # counted by name only for existing layers: few names
        try:
            self.standing.check()
            name = self._known(request.options)
            with self.admission.admit(name, int(request.x.shape[0]) if request.x.ndim else 1):
                async with timeout(request.timeout):  # wait_for would add a task: four turns of the loop
                    reply = await self._with_epoch(request, started + request.timeout)
            self.standing.check()  # it may have been given up meanwhile
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

    def _known(self, options: CallOptions) -> str:
        """The name of the layer that is asked for. A fixed epoch may have one that is gone since. Raises NotFound."""
        fixed = options.epoch is not None or options.pin is not None
        if fixed and any(options.layer in epoch.layers for epoch in self.epochs.known()):
            return options.layer
        name: str = self.layer(options.layer).name
        return name

    def layer(self, name: str) -> Layer:
        """The layer of the current epoch with this name. Raises NotFound, or Unavailable before the first epoch."""
        return _layer(self.epochs.current, name)

    def serves(self, name: str | None = None) -> bool:
        """Whether a layer of the current epoch, or each one if `name` is None, has replicas that can answer now.

        It needs one of every shared expert, and of every expert, or of any if a policy covers for the others.
        """
        epoch = self.epochs.current
        return self.standing.kept and all(
            self._serves(epoch, layer) for layer in ([name] if name is not None else epoch.layers)
        )

    def _serves(self, epoch: Epoch, name: str) -> bool:
        layer = _layer(epoch, name)
        alive = {id: self.view.serves(id, epoch.versions[id]) for id in layer.everyone_by_id}
        needed = all if layer.on_missing == "error" else any
        return all(alive[id] for id in layer.shared_ids) and needed(alive[id] for id in layer.expert_ids)

    async def _with_epoch(self, request: ForwardRequest, deadline: float) -> ForwardReply:
        options = request.options
        epoch_is_fixed = options.epoch is not None or options.pin is not None
        for attempt in range(1, EPOCH_ATTEMPTS + 1):
            epoch = await self.pinning.pin(options, request.timeout)
            try:
                return await self._answer(request, epoch, deadline)
            except VersionGone as error:  # unloaded meanwhile
                if attempt == EPOCH_ATTEMPTS:
                    raise fixed_epoch_gone(options, error) if epoch_is_fixed else error from None
                if epoch_is_fixed:  # load it again; otherwise start again from the gate on the current epoch
                    await self.pinning.fetch(epoch.number)
            finally:
                self.epochs.unpin(epoch)
        raise Unavailable("unreachable")

    async def _answer(self, request: ForwardRequest, epoch: Epoch, deadline: float) -> ForwardReply:
        layer = _layer(epoch, request.options.layer)
        checked = gate_request(layer, request.x, request.options, request.features, request.indices, request.weights)
        checked = replace(checked, deadline=deadline, client=request.client)
        routed = await self._batching.route(epoch, layer, checked)
        answer = Answer(self.fanout, request, checked, routed)
        try:
            return await answer.complete()
        finally:
            answer.release()


def _layer(epoch: Epoch, name: str) -> Layer:
    if name not in epoch.layers:
        raise NotFound(
            f"there is no layer {name[:64]!r}; this cluster serves {', '.join(sorted(epoch.layers)[:20]) or 'none'}"
        )
    return epoch.layers[name]  # type: ignore[no-any-return]

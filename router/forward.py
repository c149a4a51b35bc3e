"""One request from its rows to its answer: admit, pin an epoch, gate, fan out, wait, combine.

Shapes: T rows of the request, E experts, K choices a row, N pairs of the batch that carries it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..experts.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    NotFound,
    Unavailable,
    VersionGone,
)
from .admission import Admission
from .answer import Answer, ForwardReply, ForwardRequest
from .batch import Batch
from .dispatch import Dispatch
from .epochs import Epoch, Epochs
from .fanout import Fanout
from .gates import Routing
from .gating import Gating
from .layer import Layer
from .options import gate_request
from .pinning import Pinning, refuse_restart
from .pins import Pins
from .replicas import Replica, View
from .telemetry import Telemetry
from .transport import Transport

EPOCH_ATTEMPTS = 2


class Router:
    """Serves forward requests over the layers of the current epoch. It knows no Ray and no socket."""

    def __init__(self, transport: Transport, *, max_rows_in_flight: int = 65_536) -> None:
        self.epochs = Epochs()
        self.pins = Pins(self.epochs, time.monotonic)
        self.pinning = Pinning(self.epochs, self.pins)
        self.view = View()
        self.telemetry = Telemetry()
        self.admission = Admission(max_rows_in_flight)
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="router-torch")
        self.fanout = Fanout(transport, self.view, self.telemetry, self._run)
        self._gating = Gating(self._run, self._start_batch)

    def adopt(self, epoch: Epoch) -> bool:
        """Make an epoch the current one; requests under way keep theirs."""
        newer = self.epochs.adopt(epoch)
        if newer:
            self.pinning.adopted()
        return newer

    def update_view(self, replicas: Sequence[Replica]) -> None:
        """Take a full report of the replicas."""
        self.view.update(replicas)
        self.fanout.refresh()

    def close(self) -> None:
        """Stop the thread of torch."""
        self._torch.shutdown(wait=False, cancel_futures=True)

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
                reply = await asyncio.wait_for(self._on_some_epoch(request), request.timeout)
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
            self.telemetry.answered(name, code, loop.time() - started)

    def layer(self, name: str) -> Layer:
        """A layer of the current epoch by its name. Raises NotFound."""
        return _layer(self.epochs.current, name)

    async def _on_some_epoch(self, request: ForwardRequest) -> ForwardReply:
        options = request.options
        fixed = options.epoch is not None or options.pin is not None
        for attempt in range(1, EPOCH_ATTEMPTS + 1):
            epoch = await self.pinning.pin(options, request.timeout)
            try:
                return await self._on_epoch(request, epoch)
            except VersionGone as error:  # unloaded in the meantime
                if attempt == EPOCH_ATTEMPTS:
                    raise refuse_restart(options, error) if fixed else error from None
                if fixed:  # no other epoch will do; otherwise once more from the gate, on the current one
                    await self.pinning.fetch(epoch.number)
            finally:
                self.epochs.unpin(epoch)
        raise Unavailable("unreachable")

    async def _on_epoch(self, request: ForwardRequest, epoch: Epoch) -> ForwardReply:
        layer = _layer(epoch, request.options.layer)
        asked = gate_request(layer, request.x, request.options, request.features, request.indices, request.weights)
        routed = await self._gating.route(epoch, layer, asked)
        try:
            return await Answer(self._run, self.fanout, request, asked, routed).complete()
        finally:
            routed.batch.release()

    def _start_batch(self, epoch: Epoch, layer: Layer, x: Tensor, routing: Routing, handle: Dispatch) -> Batch:
        self.telemetry.batches[layer.name] += 1
        answers = {}
        for expert, expert_id in enumerate(layer.expert_ids):
            pairs = handle.pairs(expert)
            if pairs.stop > pairs.start:
                version = epoch.versions[expert_id]
                answers[expert] = self.fanout.submit(expert_id, version, x, handle.rows_N[pairs])
                mass = float(handle.weights_N[pairs].abs().sum())
                self.telemetry.gate_mass[expert_id] = self.telemetry.gate_mass.get(expert_id, 0.0) + mass
        if x.shape[0]:
            every = torch.arange(x.shape[0])
            for position, shared_id in enumerate(layer.shared_ids, start=len(layer.experts)):
                answers[position] = self.fanout.submit(shared_id, epoch.versions[shared_id], x, every)
        return Batch(epoch, layer, x, routing, handle, answers)

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._torch, _inference, function, arguments)


def _layer(epoch: Epoch, name: str) -> Layer:
    if name not in epoch.layers:
        raise NotFound(f"there is no layer {name[:64]!r}; known are {', '.join(sorted(epoch.layers)[:20])}")
    return epoch.layers[name]  # type: ignore[no-any-return]


def _inference(function: Any, arguments: tuple[Any, ...]) -> Any:
    with torch.inference_mode():
        return function(*arguments)

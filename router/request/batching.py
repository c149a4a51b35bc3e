"""Batching: requests that wait together pass the gate as one batch, each with its own options.

Shapes: T rows of a batch, E experts, K choices per row, N pairs of a row and an expert.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...experts.errors import ExpertFailed, ExpertMeshError
from ..epochs.epochs import Epoch
from ..fanout.batch import Batch
from ..fanout.fair_queue import FairQueue
from ..fanout.fanout import Fanout
from ..gates import Gate, Routing
from ..gates.routing import join
from ..mixture.capacity import Capacity
from ..mixture.dispatch import Dispatch, dispatch
from ..mixture.layer import Layer
from .batch_timing import BatchTiming

MAX_BATCH_ROWS = 4_096
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class GateRequest:
    """A request to the gate: rows `x` [T, ...] and the choices that it allows.

    The gate reads `features` [T, ...]. `allowed` is bool [E], None for all experts; `k` is None for the gate's own.
    `routing` is the caller's own routing, which skips the gate. `deadline` is in event-loop time.
    """

    x: Tensor
    features: Tensor
    allowed: Tensor | None = None
    k: int | None = None
    routing: Routing | None = None
    deadline: float = math.inf
    client: str = ""

    @property
    def size(self) -> int:
        return int(self.x.shape[0])


@dataclass(frozen=True, eq=False)
class Routed:
    """The place of a request's rows in the batch that carries them: its rows start:stop."""

    batch: Batch
    start: int
    stop: int

    def handle(self) -> Dispatch:
        """The part of the batch's dispatch that belongs to the request."""
        return self.batch.handle.slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: GateRequest
    routed: asyncio.Future[Routed]


@dataclass(eq=False)
class _BatchQueue:
    """Waiting requests for one gate on one epoch, with rows of one kind."""

    epoch: Epoch
    layer: Layer
    requests: FairQueue[_Waiting] = field(default_factory=FairQueue)
    rows: int = 0

    def take(self) -> list[_Waiting]:
        """Take the requests of the next batch: clients in turns, up to the row limit, no cancelled requests."""
        taken: list[_Waiting] = []
        rows = 0
        while (waiting := self.requests.peek()) is not None:
            cancelled = waiting.routed.done()
            if taken and not cancelled and rows + waiting.request.size > MAX_BATCH_ROWS:
                break
            self.requests.pop()
            self.rows -= waiting.request.size
            if not cancelled:
                taken.append(waiting)
                rows += waiting.request.size
        return taken


class Batching:
    """Collects requests by (layer, epoch, kind of rows), runs the gate once over all that wait, and starts a batch."""

    def __init__(self, fanout: Fanout) -> None:
        self._fanout = fanout
        self._queues: dict[tuple[Any, ...], _BatchQueue] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timings: defaultdict[str, BatchTiming] = defaultdict(BatchTiming)
        self._changed: dict[str, asyncio.Event] = {}

    async def route(self, epoch: Epoch, layer: Layer, request: GateRequest) -> Routed:
        """Choose experts for the rows of a request, together with others that wait for the same gate.

        Raises what the gate raises: InvalidRequest, SpecMismatch, or ExpertFailed for an exception of foreign code.
        """
        x, features = request.x, request.features
        key = (layer.name, epoch.number, x.dtype, x.shape[1:], features.dtype, features.shape[1:])
        routed: asyncio.Future[Routed] = asyncio.get_running_loop().create_future()
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _BatchQueue(epoch, layer)
            task = asyncio.get_running_loop().create_task(self._drain(key, queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        queue.requests.put(request.client, _Waiting(request, routed))
        queue.rows += request.size
        if layer.name in self._changed and self._wait(queue) <= 0.0:
            self._changed[layer.name].set()
        try:
            return await routed
        except asyncio.CancelledError:
            if routed.done() and not routed.cancelled() and routed.exception() is None:
                routed.result().batch.release()  # routed, but the request was cancelled at the same time
            raise

    async def _drain(self, key: tuple[Any, ...], queue: _BatchQueue) -> None:
        while len(queue.requests):
            await self._gather(queue)
            taken = queue.take()
            if taken:
                self._start_or_fail(queue.epoch, queue.layer, taken)
        del self._queues[key]

    async def _gather(self, queue: _BatchQueue) -> None:
        """Let requests gather until another batch of the layer may start."""
        if (seconds := self._wait(queue)) <= 0.0:
            return
        changed, timed_out = self._changed.setdefault(queue.layer.name, asyncio.Event()), False

        def time_out() -> None:
            nonlocal timed_out
            timed_out = True
            changed.set()

        timer = asyncio.get_running_loop().call_later(seconds, time_out)
        while not timed_out and self._wait(queue) > 0.0:
            changed.clear()
            await changed.wait()
        timer.cancel()

    def _wait(self, queue: _BatchQueue) -> float:
        """How many more seconds the requests of a queue may gather."""
        if queue.rows >= MAX_BATCH_ROWS:
            return 0.0
        return self._timings[queue.layer.name].wait(queue.rows)

    def _start_or_fail(self, epoch: Epoch, layer: Layer, taken: list[_Waiting]) -> None:
        try:
            self._start(epoch, layer, taken)
        except Exception as error:  # noqa: BLE001 (a custom gate is foreign code and may raise anything)
            if len(taken) > 1:  # one bad request must not fail the others
                for single in taken:
                    self._start_or_fail(epoch, layer, [single])
            elif not taken[0].routed.done():
                taken[0].routed.set_exception(_gate_error(layer, error))

    def _start(self, epoch: Epoch, layer: Layer, taken: list[_Waiting]) -> None:
        requests = [waiting.request for waiting in taken]
        x, routing, handle = route_together(layer.gate, requests, layer.capacity)
        clients = {request.client for request in requests}
        deadline = max(request.deadline for request in requests)
        client = clients.pop() if len(clients) == 1 else ""
        merged = len(requests) > 1
        batch = self._fanout.start(epoch, layer, x, routing, handle, deadline=deadline, client=client, merged=merged)
        self._measure(batch)
        start = 0
        for waiting in taken:
            stop = start + waiting.request.size
            if not waiting.routed.done():
                batch.hold()
                waiting.routed.set_result(Routed(batch, start, stop))
            start = stop
        batch.release()

    def _measure(self, batch: Batch) -> None:
        """Measure the time until the batch has all its answers; a batch without work is not measured."""
        if batch.answers.complete:
            return
        loop, name = asyncio.get_running_loop(), batch.layer.name
        timing, started = self._timings[name], loop.time()

        def ended() -> None:
            timing.ended(loop.time() - started)
            if name in self._changed:
                self._changed[name].set()

        timing.started(batch.handle.num_rows)
        batch.when_complete(ended)


@torch.inference_mode()
def route_together(
    gate: Gate, requests: Sequence[GateRequest], capacity: Capacity | None = None
) -> tuple[Tensor, Routing, Dispatch]:
    """Run the gate over the joined rows of several requests, and group the rows by expert.

    Choices that depend on other rows (a gate that is not `per_row`, capacity) are made for each request alone.
    """
    x = requests[0].x if len(requests) == 1 else torch.cat([request.x for request in requests])
    routing = _select(gate, requests, capacity)
    return x, routing, dispatch(routing, gate.num_experts)


def _select(gate: Gate, requests: Sequence[GateRequest], capacity: Capacity | None) -> Routing:
    to_route = [request for request in requests if request.routing is None]
    one_select = len(to_route) == len(requests) and all(request.k is None for request in requests)
    if one_select and gate.per_row and capacity is None:
        scores_TE = gate.scores(_joined([request.features for request in requests]))
        return gate.select(scores_TE, mask_TE=_mask(requests, gate.num_experts))
    scores: Iterator[Tensor] = iter(())
    if to_route:
        scores_TE = gate.scores(_joined([request.features for request in to_route]))
        scores = iter(torch.split(scores_TE, [request.size for request in to_route]))
    routings = [
        request.routing or gate.select(next(scores), mask_TE=request.allowed, k=request.k) for request in requests
    ]
    if capacity is not None:
        routings = [capacity.apply(routing, gate.num_experts) for routing in routings]
    return join(routings)


def _mask(requests: Sequence[GateRequest], num_experts: int) -> Tensor | None:
    if all(request.allowed is None for request in requests):
        return None
    all_allowed = torch.ones(num_experts, dtype=torch.bool)
    masks = [all_allowed if request.allowed is None else request.allowed for request in requests]
    return torch.cat([mask.expand(request.size, -1) for mask, request in zip(masks, requests, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _gate_error(layer: Layer, error: Exception) -> ExpertMeshError:
    if isinstance(error, ExpertMeshError):
        return error
    log.error("gate raised", exc_info=error, extra={"layer": layer.name})
    return ExpertFailed(f"the gate of layer {layer.name} raised {type(error).__name__}; see the log of the router")

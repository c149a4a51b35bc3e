"""Gating: requests that wait together go through the gate as one batch, each with its own options.

Shapes: T rows of a batch, E experts, K choices a row, N pairs of a row and an expert.
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
from ..fanout.fair_queue import FairQueue
from ..fanout.fanout import Batch, Fanout
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
    """What the gate is asked for one request: rows `x` [T, ...] and what it may choose.

    `features` [T, ...] is what the gate looks at. `allowed` bool [E] or None; `k` or None; `given` is a routing that
    the caller already has, which skips the gate. `deadline` is on the clock of the event loop.
    """

    x: Tensor
    features: Tensor
    allowed: Tensor | None = None
    k: int | None = None
    given: Routing | None = None
    deadline: float = math.inf
    client: str = ""

    @property
    def size(self) -> int:
        return int(self.x.shape[0])


@dataclass(frozen=True, eq=False)
class Routed:
    """Where a request's rows lie in the batch that carries them, and who was chosen for them."""

    batch: Batch
    start: int
    stop: int

    def handle(self) -> Dispatch:
        """The request's own part of the batch's dispatch."""
        return self.batch.handle.slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: GateRequest
    answer: asyncio.Future[Routed]


@dataclass(eq=False)
class _Line:
    """Requests for one gate on one epoch, with rows of one kind."""

    epoch: Epoch
    layer: Layer
    queue: FairQueue[_Waiting] = field(default_factory=FairQueue)
    rows: int = 0

    def take(self) -> list[_Waiting]:
        """The requests of the next batch, clients in turns, up to the row limit, without those nobody waits for."""
        taken: list[_Waiting] = []
        rows = 0
        while (waiting := self.queue.peek()) is not None:
            gone = waiting.answer.done()
            if taken and not gone and rows + waiting.request.size > MAX_BATCH_ROWS:
                break
            self.queue.pop()
            self.rows -= waiting.request.size
            if not gone:
                taken.append(waiting)
                rows += waiting.request.size
        return taken


class Gating:
    """Collects requests by (layer, epoch, kind of rows), runs the gate once over all that wait, and has them sent."""

    def __init__(self, fanout: Fanout) -> None:
        self._fanout = fanout
        self._lines: dict[tuple[Any, ...], _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timings: defaultdict[str, BatchTiming] = defaultdict(BatchTiming)
        self._room: dict[str, asyncio.Event] = {}

    async def route(self, epoch: Epoch, layer: Layer, request: GateRequest) -> Routed:
        """Choose experts for the rows of a request, together with others that wait for the same gate.

        Raises what the gate raises: InvalidRequest, SpecMismatch.
        """
        x, features = request.x, request.features
        key = (layer.name, epoch.number, x.dtype, x.shape[1:], features.dtype, features.shape[1:])
        answer: asyncio.Future[Routed] = asyncio.get_running_loop().create_future()
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(epoch, layer)
            task = asyncio.get_running_loop().create_task(self._drain(key, line))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        line.queue.put(request.client, _Waiting(request, answer))
        line.rows += request.size
        if layer.name in self._room and self._wait(line) <= 0.0:
            self._room[layer.name].set()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().batch.release()  # it came, but whoever asked for it has just gone
            raise

    async def _drain(self, key: tuple[Any, ...], line: _Line) -> None:
        while len(line.queue):
            await self._gather(line)
            taken = line.take()
            if taken:
                self._serve(line.epoch, line.layer, taken)
        del self._lines[key]

    async def _gather(self, line: _Line) -> None:
        """Let requests gather while there is no room for another batch of the layer."""
        if (seconds := self._wait(line)) <= 0.0:
            return
        room, over = self._room.setdefault(line.layer.name, asyncio.Event()), False

        def end() -> None:
            nonlocal over
            over = True
            room.set()

        timer = asyncio.get_running_loop().call_later(seconds, end)
        while not over and self._wait(line) > 0.0:
            room.clear()
            await room.wait()
        timer.cancel()

    def _wait(self, line: _Line) -> float:
        """How long requests of a line may gather from now on, in seconds."""
        if line.rows >= MAX_BATCH_ROWS:
            return 0.0
        return self._timings[line.layer.name].wait(line.rows)

    def _serve(self, epoch: Epoch, layer: Layer, taken: list[_Waiting]) -> None:
        try:
            self._batch(epoch, layer, taken)
        except Exception as error:  # noqa: BLE001 (a custom gate is foreign code and may raise anything)
            if len(taken) > 1:  # one bad request must not spoil those that waited with it
                for single in taken:
                    self._serve(epoch, layer, [single])
            elif not taken[0].answer.done():
                taken[0].answer.set_exception(_gate_error(layer, error))

    def _batch(self, epoch: Epoch, layer: Layer, taken: list[_Waiting]) -> None:
        requests = [waiting.request for waiting in taken]
        x, routing, handle = route_together(layer.gate, requests, layer.capacity)
        clients = {request.client for request in requests}
        deadline = max(request.deadline for request in requests)
        client = clients.pop() if len(clients) == 1 else ""
        batch = self._fanout.start(epoch, layer, x, routing, handle, deadline=deadline, client=client)
        self._watch(batch)
        start = 0
        for waiting in taken:
            stop = start + waiting.request.size
            if not waiting.answer.done():
                batch.hold()
                waiting.answer.set_result(Routed(batch, start, stop))
            start = stop
        batch.release()

    def _watch(self, batch: Batch) -> None:
        """Time the layer's batches: note when this one has all its answers. One without work says nothing of that."""
        if batch.answers.complete:
            return
        loop, name = asyncio.get_running_loop(), batch.layer.name
        timing, begun = self._timings[name], loop.time()

        def ended() -> None:
            timing.ended(loop.time() - begun)
            if name in self._room:
                self._room[name].set()

        timing.begun(batch.handle.num_rows)
        batch.when_complete(ended)


@torch.inference_mode()
def route_together(
    gate: Gate, requests: Sequence[GateRequest], capacity: Capacity | None = None
) -> tuple[Tensor, Routing, Dispatch]:
    """Run the gate over the joined rows of several requests, and group the rows by expert.

    What depends on other rows (a gate that is not `per_row`, capacity) is decided for each request alone.
    """
    x = requests[0].x if len(requests) == 1 else torch.cat([request.x for request in requests])
    routing = _select(gate, requests, capacity)
    return x, routing, dispatch(routing, gate.num_experts)


def _select(gate: Gate, requests: Sequence[GateRequest], capacity: Capacity | None) -> Routing:
    asked = [request for request in requests if request.given is None]
    alike = len(asked) == len(requests) and all(request.k is None for request in requests)
    if alike and gate.per_row and capacity is None:
        scores_TE = gate.scores(_joined([request.features for request in requests]))
        return gate.select(scores_TE, mask_TE=_mask(requests, gate.num_experts))
    scores: Iterator[Tensor] = iter(())
    if asked:
        scores_TE = gate.scores(_joined([request.features for request in asked]))
        scores = iter(torch.split(scores_TE, [request.size for request in asked]))
    routings = [
        request.given or gate.select(next(scores), mask_TE=request.allowed, k=request.k) for request in requests
    ]
    if capacity is not None:
        routings = [capacity.apply(routing, gate.num_experts) for routing in routings]
    return join(routings)


def _mask(requests: Sequence[GateRequest], num_experts: int) -> Tensor | None:
    if all(request.allowed is None for request in requests):
        return None
    everyone = torch.ones(num_experts, dtype=torch.bool)
    masks = [everyone if request.allowed is None else request.allowed for request in requests]
    return torch.cat([mask.expand(request.size, -1) for mask, request in zip(masks, requests, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _gate_error(layer: Layer, error: Exception) -> ExpertMeshError:
    if isinstance(error, ExpertMeshError):
        return error
    log.error("gate raised", exc_info=error, extra={"layer": layer.name})
    return ExpertFailed(f"the gate of layer {layer.name} raised {type(error).__name__}; see the log of the router")

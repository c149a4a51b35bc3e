"""Fan-out: sends the work of a batch to replicas that can do it, in few messages, and retries if a replica is lost.

Every replica has a lane with at most `WINDOW` messages in flight. Work that arrives meanwhile waits and goes together
in the next message. So a slow expert delays only the requests that need it, and waiting work can still be dropped.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ...experts.errors import BY_NAME, DataLoss, ExpertMeshError, Unavailable, VersionGone
from ...experts.protocol import ExpertReply, PartFailure
from ..epochs.epochs import Epoch
from ..gates import Routing
from ..mixture.dispatch import Dispatch
from ..mixture.layer import Layer
from .answers import Answered, Answers, Result
from .fair_queue import FairQueue
from .message import Place, build_call, same_kind
from .replica_view import Replica, View
from .telemetry import Telemetry
from .transport import Transport, sending_error
from .work import Assignment, Work, assign

WINDOW = 2
MAX_ROWS_PER_MESSAGE = 16_384
MAX_PARTS_PER_MESSAGE = 256
MAX_ATTEMPTS = 3


@dataclass(eq=False)
class Batch:
    """Rows `x` [T, ...] of one layer on one epoch, in flight to experts and back.

    Each request that waits for the batch holds it; when the last one releases it, `cancel` drops the unfinished work.
    """

    epoch: Epoch
    layer: Layer
    x: Tensor
    routing: Routing
    handle: Dispatch
    assignment: Assignment
    cancel: Callable[[], None] = lambda: None
    answers: Answers = field(init=False)
    _waiters: list[tuple[set[int], asyncio.Future[None]]] = field(default_factory=list)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)
    _holders: int = 1

    def __post_init__(self) -> None:
        self.answers = Answers(self.layer, self.assignment)

    def hold(self) -> None:
        """Add a holder."""
        self._holders += 1

    def release(self) -> None:
        """Remove a holder; the last one cancels the unfinished work."""
        self._holders -= 1
        if self._holders == 0 and not self.answers.complete:
            self.cancel()
            self._call_back()

    def when_complete(self, callback: Callable[[], None]) -> None:
        """Call back once all work is answered or cancelled; at once if it is answered already."""
        if self.answers.complete:
            callback()
        else:
            self._callbacks.append(callback)

    def answer(self, key: int, result: Result) -> None:
        """Store the result of one piece of work, by its key in the assignment."""
        self.answers.put(key, result)
        for pending, future in self._waiters:
            pending.discard(key)
            if not pending and not future.done():
                future.set_result(None)
        if self.answers.complete:
            self._call_back()

    async def wait(self, experts: Sequence[int]) -> dict[int, ExpertMeshError]:
        """Wait until these experts have answered or failed; returns the errors of those that failed."""
        if pending := self.answers.pending(experts):
            future = asyncio.get_running_loop().create_future()
            self._waiters.append((pending, future))
            await future
        return self.answers.errors(experts)

    def _call_back(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


@dataclass(eq=False)
class Job:
    """One piece of work; `done` gets its answer or error, once."""

    work: Work
    done: Callable[[Result], None]
    finished: bool = False
    attempts: int = 0
    tried: set[str] = field(default_factory=set)
    replica_id: str | None = None
    message: _Message | None = None


@dataclass(eq=False)
class _Message:
    """Jobs in flight together."""

    replica: Replica
    jobs: list[Job]
    places: list[Place] = field(default_factory=list)
    started: float = 0.0
    cancel: Callable[[], object] = lambda: None


@dataclass(eq=False)
class _Lane:
    """The jobs that wait for a replica, and the messages in flight to it."""

    replica: Replica
    waiting: FairQueue[Job] = field(default_factory=FairQueue)
    in_flight: set[_Message] = field(default_factory=set)

    def take(self) -> list[Job]:
        """Take the jobs of the next message: clients in turns, up to the row and part limits, no cancelled jobs."""
        taken: list[Job] = []
        rows = parts = 0
        while (job := self.waiting.peek()) is not None:
            rows, parts = rows + job.work.size, parts + len(job.work.experts)
            if job.finished:
                rows, parts = rows - job.work.size, parts - len(job.work.experts)
            elif taken and not (
                rows <= MAX_ROWS_PER_MESSAGE and parts <= MAX_PARTS_PER_MESSAGE and same_kind(job.work, taken[0].work)
            ):
                break
            else:
                taken.append(job)
            self.waiting.pop()
        return taken


class Fanout:
    """Sends work through a transport to the replicas that the view chooses."""

    def __init__(self, transport: Transport, view: View, telemetry: Telemetry) -> None:
        self._transport = transport
        self._view = view
        self._telemetry = telemetry
        self._lanes: dict[str, _Lane] = {}
        self._to_flush: dict[str, _Lane] = {}
        self._attempts = itertools.count(1)

    def start(
        self, epoch: Epoch, layer: Layer, x: Tensor, routing: Routing, handle: Dispatch, *, deadline: float, client: str
    ) -> Batch:
        """Send the rows `x` [T, ...] of a batch to the experts that `handle` names. The caller holds the batch.

        `deadline` is in event-loop time; `client` sent the rows ("" for several).
        """
        assignment = assign(layer, epoch.versions, x, handle, deadline=deadline, client=client)
        batch = Batch(epoch, layer, x, routing, handle, assignment)
        jobs = [self.submit(work, partial(batch.answer, key)) for key, work in assignment.work.items()]
        batch.cancel = partial(self._cancel_all, jobs)
        self.flush()
        self._telemetry.batches[layer.name] += 1
        self._telemetry.add_gate_mass(layer.expert_ids, handle.mass())
        return batch

    def submit(self, work: Work, done: Callable[[Result], None]) -> Job:
        """Send work to a replica; `done` gets the answer, or an error if no replica could do the work.

        The failure of a single expert is part of the answer.
        """
        job = Job(work, done)
        self._enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job: rows that still wait are not sent, and `done` is not called."""
        if job.finished:
            return
        job.finished = True
        self._uncount(job)
        if job.message is not None and all(other.finished for other in job.message.jobs):
            job.message.cancel()
            self._close(job.message)

    def _cancel_all(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.cancel(job)

    async def submit_and_wait(self, work: Work) -> Answered:
        """Submit work and wait for its answer. Raises the error that `done` would get."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = self.submit(work, lambda result: None if answer.done() else answer.set_result(result))
        try:
            result = await answer
        finally:
            self.cancel(job)
        if isinstance(result, ExpertMeshError):
            raise result
        return result

    def refresh(self) -> None:
        """Compare the lanes with the view: work for an incarnation that is gone or restarting is sent again."""
        incarnations = {
            replica.id: replica.incarnation for replica in self._view.replicas() if replica.state != "restarting"
        }
        for name, lane in list(self._lanes.items()):
            if incarnations.get(name) != lane.replica.incarnation:
                del self._lanes[name]
                for message in lane.in_flight:
                    message.cancel()
                in_flight = [job for message in lane.in_flight for job in message.jobs]
                self._resend(name, [*in_flight, *lane.waiting.drain()])

    def waiting(self) -> dict[str, int]:
        """The rows that wait in each lane, by replica."""
        # Iterate over copies: the metrics page reads this from another thread.
        return {name: sum(job.work.size for job in lane.waiting.items()) for name, lane in list(self._lanes.items())}

    def _enqueue(self, job: Job) -> None:
        try:
            replica = self._view.choose(job.work.versions, exclude=job.tried)
        except ExpertMeshError as error:
            self._finish(job, error)
            return
        name = replica.id
        job.tried.add(name)
        job.attempts += 1
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(replica)
        lane.waiting.put(job.work.client, job)
        job.replica_id = name
        self._view.sent(name, job.work.size)
        if len(lane.in_flight) < WINDOW:
            if not self._to_flush:
                asyncio.get_running_loop().call_soon(self.flush)
            self._to_flush[name] = lane

    def flush(self) -> None:
        """Send submitted work now, as far as lanes have room; otherwise it goes at the next turn of the event loop."""
        lanes, self._to_flush = self._to_flush, {}
        for name, lane in lanes.items():
            self._fill(name, lane)

    def _fill(self, name: str, lane: _Lane) -> None:
        while len(lane.in_flight) < WINDOW and self._lanes.get(name) is lane:
            jobs = lane.take()
            if not jobs:
                return
            self._send(lane, jobs)

    def _send(self, lane: _Lane, jobs: list[Job]) -> None:
        message = _Message(lane.replica, jobs, started=asyncio.get_running_loop().time())
        for job in jobs:
            job.message = message
        works = [job.work for job in jobs]
        lane.in_flight.add(message)
        try:
            call, message.places = build_call(next(self._attempts), works, now=message.started)
            message.cancel = self._transport.send(lane.replica, call, partial(self._returned, lane, message))
        except Exception as error:  # noqa: BLE001 (the message cannot be encoded, or memory runs out)
            lane.in_flight.discard(message)
            failure = sending_error(error)
            for job in jobs:
                self._finish(job, failure)
            return
        self._telemetry.messages[lane.replica.id] += 1
        self._telemetry.copied += 0 if call.rows is works[0].x else call.rows.nbytes

    def _returned(self, lane: _Lane, message: _Message, reply: ExpertReply | ExpertMeshError) -> None:
        if message not in lane.in_flight or self._lanes.get(lane.replica.id) is not lane:
            return  # it was cancelled, or its lane was dropped
        self._close(message)
        if isinstance(reply, Unavailable):
            self._view.failed(lane.replica.id)
            for job in message.jobs:
                self._retry(job, reply)
        elif isinstance(reply, ExpertMeshError):
            for job in message.jobs:
                self._finish(job, reply)
        else:
            seconds = asyncio.get_running_loop().time() - message.started
            self._telemetry.add_message_seconds(lane.replica.id, reply.queued, reply.computed)
            for job, place in zip(message.jobs, message.places, strict=True):
                self._deliver(job, _answer(reply, place), seconds)

    def _close(self, message: _Message) -> None:
        """Remove a finished message from its lane, which has room for another."""
        name = message.replica.id
        lane = self._lanes.get(name)
        if lane is not None and message in lane.in_flight:
            lane.in_flight.discard(message)
            self._fill(name, lane)

    def _deliver(self, job: Job, answer: Result, seconds: float) -> None:
        if isinstance(answer, VersionGone):
            self._retry(job, answer)
        elif isinstance(answer, ExpertMeshError):
            self._telemetry.errors[job.work.experts[0][0]] += 1
            self._finish(job, answer)
        else:
            for (expert, _, rows), output in zip(job.work.experts, answer.outputs, strict=True):
                if isinstance(output, ExpertMeshError):
                    self._telemetry.errors[expert] += 1
                else:
                    self._telemetry.count_answer(expert, rows, seconds)
            self._finish(job, answer)

    def _finish(self, job: Job, result: Result) -> None:
        if not job.finished:
            job.finished = True
            self._uncount(job)
            job.done(result)

    def _resend(self, name: str, jobs: Iterable[Job]) -> None:
        """Send the jobs of a replaced incarnation again; its successor may take them."""
        for job in jobs:
            job.tried.discard(name)
            self._retry(job, Unavailable("the replica was replaced"))

    def _retry(self, job: Job, error: ExpertMeshError) -> None:
        """Send a job whose answer was lost to another replica; inference is idempotent."""
        if job.finished:
            return
        self._telemetry.errors[job.work.experts[0][0]] += 1
        self._uncount(job)
        if job.attempts >= MAX_ATTEMPTS:
            self._finish(job, Unavailable(f"{job.work.experts[0][0]} did not answer: {error.message}"))
            return
        self._telemetry.retries += 1
        self._enqueue(job)

    def _uncount(self, job: Job) -> None:
        if job.replica_id is not None:
            self._view.sent(job.replica_id, -job.work.size)
            job.replica_id = None


def _answer(reply: ExpertReply, place: Place) -> Answered | ExpertMeshError:
    """The part of a reply that belongs to one of the jobs of its message."""
    if len(reply.outputs) != place.all_parts or len(reply.sums) != place.all_sums:
        return DataLoss(f"a replica answered {len(reply.outputs)} of {place.all_parts} parts of a message")
    outputs = tuple(_output(output) for output in reply.outputs[place.parts])
    version_gone = next((output for output in outputs if isinstance(output, VersionGone)), None)
    if version_gone is not None:  # one replica must do the whole job
        return version_gone
    if place.sum is None:
        return Answered(outputs)
    total = _output(reply.sums[place.sum])
    if isinstance(total, ExpertMeshError):
        failed = all(isinstance(output, ExpertMeshError) for output in outputs)
        return Answered(outputs) if failed else total
    return Answered(outputs, total, place.lost(reply.lost))


def _output(output: Tensor | PartFailure | None) -> Tensor | ExpertMeshError | None:
    if isinstance(output, PartFailure):
        return BY_NAME.get(output.error, ExpertMeshError)(output.message)
    return output

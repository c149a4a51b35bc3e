"""Fan-out: a batch's work to the replicas that can do it, few messages, and another try when a replica is lost.

Every replica has a lane: at most `WINDOW` messages are under way to it, and what comes in the meantime waits and goes
together in the next one. So a slow expert holds up only those who need it, and waiting work can still be dropped.
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
from .message import Place, alike, build_call
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
    """Rows `x` [T, ...] of one layer on one epoch, on their way to experts and back.

    The batch is held by those who wait for it; when the last one lets go, work that is left is given up by `cancel`.
    """

    epoch: Epoch
    layer: Layer
    x: Tensor
    routing: Routing
    handle: Dispatch
    assignment: Assignment
    cancel: Callable[[], None] = lambda: None
    answers: Answers = field(init=False)
    _waiting: list[tuple[set[int], asyncio.Future[None]]] = field(default_factory=list)
    _complete: list[Callable[[], None]] = field(default_factory=list)
    _holders: int = 1

    def __post_init__(self) -> None:
        self.answers = Answers(self.layer, self.assignment)

    def hold(self) -> None:
        """Keep the batch's work wanted."""
        self._holders += 1

    def release(self) -> None:
        """Let go; the last one gives up the work that is left."""
        self._holders -= 1
        if self._holders == 0 and not self.answers.complete:
            self.cancel()
            self._end()

    def when_complete(self, call: Callable[[], None]) -> None:
        """Call something once all work is answered or given up; at once where it is."""
        if self.answers.complete:
            call()
        else:
            self._complete.append(call)

    def answer(self, key: int, result: Result) -> None:
        """Take what came of one piece of work, by its key in the assignment."""
        self.answers.put(key, result)
        for left, future in self._waiting:
            left.discard(key)
            if not left and not future.done():
                future.set_result(None)
        if self.answers.complete:
            self._end()

    async def wait(self, experts: Sequence[int]) -> dict[int, ExpertMeshError]:
        """Wait until these experts have answered or failed; returns why, for those that failed."""
        if left := self.answers.lacking(experts):
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((left, future))
            await future
        return self.answers.errors(experts)

    def _end(self) -> None:
        calls, self._complete = self._complete, []
        for call in calls:
            call()


@dataclass(eq=False)
class Job:
    """One piece of work; `done` gets its answer, or the reason why not, once."""

    work: Work
    done: Callable[[Result], None]
    over: bool = False
    attempts: int = 0
    tried: set[str] = field(default_factory=set)
    at: str | None = None
    message: _Message | None = None


@dataclass(eq=False)
class _Message:
    """Jobs under way together."""

    replica: Replica
    jobs: list[Job]
    places: list[Place] = field(default_factory=list)
    started: float = 0.0
    cancel: Callable[[], object] = lambda: None


@dataclass(eq=False)
class _Lane:
    replica: Replica
    waiting: FairQueue[Job] = field(default_factory=FairQueue)
    under_way: set[_Message] = field(default_factory=set)

    def take(self) -> list[Job]:
        """The jobs of the next message: clients in turns, up to the row limit, without those nobody waits for."""
        taken: list[Job] = []
        rows = parts = 0
        while (job := self.waiting.peek()) is not None:
            rows, parts = rows + job.work.size, parts + len(job.work.experts)
            if job.over:
                rows, parts = rows - job.work.size, parts - len(job.work.experts)
            elif taken and not (
                rows <= MAX_ROWS_PER_MESSAGE and parts <= MAX_PARTS_PER_MESSAGE and alike(job.work, taken[0].work)
            ):
                break
            else:
                taken.append(job)
            self.waiting.pop()
        return taken


class Fanout:
    """Sends work to replicas through a transport, as the view says."""

    def __init__(self, transport: Transport, view: View, telemetry: Telemetry) -> None:
        self._transport = transport
        self._view = view
        self._telemetry = telemetry
        self._lanes: dict[str, _Lane] = {}
        self._filled: dict[str, _Lane] = {}
        self._attempts = itertools.count(1)

    def start(
        self, epoch: Epoch, layer: Layer, x: Tensor, routing: Routing, handle: Dispatch, *, deadline: float, client: str
    ) -> Batch:
        """Send the rows `x` [T, ...] of a batch to the experts that `handle` groups them by. Held once, by the caller.

        `deadline` is on the clock of the event loop; `client` is whose rows they are, "" for those of several.
        """
        assignment = assign(layer, epoch.versions, x, handle, deadline=deadline, client=client)
        batch = Batch(epoch, layer, x, routing, handle, assignment)
        jobs = [self.submit(work, partial(batch.answer, key)) for key, work in assignment.work.items()]
        batch.cancel = partial(self._cancel_all, jobs)
        self.flush()
        self._telemetry.batches[layer.name] += 1
        self._telemetry.chosen(layer.expert_ids, handle.mass())
        return batch

    def submit(self, work: Work, done: Callable[[Result], None]) -> Job:
        """Have a replica do some work; `done` gets what came of it.

        That is Unavailable, VersionGone or SpecMismatch where nobody could do it; an expert's own failure is in the
        answer.
        """
        job = Job(work, done)
        self._place(job)
        return job

    def cancel(self, job: Job) -> None:
        """Give a job up: its rows are taken out of the queue if they still wait, and `done` hears nothing."""
        if job.over:
            return
        job.over = True
        self._leave(job)
        if job.message is not None and all(other.over for other in job.message.jobs):
            job.message.cancel()
            self._ended(job.message)

    def _cancel_all(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.cancel(job)

    async def ask(self, work: Work) -> Answered:
        """Submit and wait. Raises what `done` would get."""
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
        """Look at the view again: what was sent to an incarnation that is no more, or is dead, is sent elsewhere."""
        now = {replica.id: replica.incarnation for replica in self._view.replicas() if replica.state != "restarting"}
        for name, lane in list(self._lanes.items()):
            if now.get(name) != lane.replica.incarnation:
                del self._lanes[name]
                for message in lane.under_way:
                    message.cancel()
                under_way = [job for message in lane.under_way for job in message.jobs]
                self._replaced(name, [*under_way, *lane.waiting.drain()])

    def waiting(self) -> dict[str, int]:
        """Rows that wait for their turn, by replica."""
        # Copies first: the metrics page asks from a thread of its own.
        return {name: sum(job.work.size for job in lane.waiting.items()) for name, lane in list(self._lanes.items())}

    def _place(self, job: Job) -> None:
        try:
            replica = self._view.choose(job.work.wanted, exclude=job.tried)
        except ExpertMeshError as error:
            self._tell(job, error)
            return
        name = replica.id
        job.tried.add(name)
        job.attempts += 1
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(replica)
        lane.waiting.put(job.work.client, job)
        job.at = name
        self._view.sent(name, job.work.size)
        if len(lane.under_way) < WINDOW:
            if not self._filled:
                asyncio.get_running_loop().call_soon(self.flush)
            self._filled[name] = lane

    def flush(self) -> None:
        """Send what was submitted and has room. Without this it goes at the end of this turn of the loop."""
        filled, self._filled = self._filled, {}
        for name, lane in filled.items():
            self._pump(name, lane)

    def _pump(self, name: str, lane: _Lane) -> None:
        while len(lane.under_way) < WINDOW and self._lanes.get(name) is lane:
            jobs = lane.take()
            if not jobs:
                return
            self._send(lane, jobs)

    def _send(self, lane: _Lane, jobs: list[Job]) -> None:
        message = _Message(lane.replica, jobs, started=asyncio.get_running_loop().time())
        for job in jobs:
            job.message = message
        works = [job.work for job in jobs]
        lane.under_way.add(message)
        try:
            call, message.places = build_call(next(self._attempts), works, now=message.started)
            message.cancel = self._transport.send(lane.replica, call, partial(self._returned, lane, message))
        except Exception as error:  # noqa: BLE001 (what cannot be written as a message, or memory that is not there)
            lane.under_way.discard(message)
            told = sending_error(error)
            for job in jobs:
                self._tell(job, told)
            return
        self._telemetry.messages[lane.replica.id] += 1
        self._telemetry.copied += 0 if call.rows is works[0].x else call.rows.nbytes

    def _returned(self, lane: _Lane, message: _Message, reply: ExpertReply | ExpertMeshError) -> None:
        if message not in lane.under_way or self._lanes.get(lane.replica.id) is not lane:
            return  # it was given up
        self._ended(message)
        if isinstance(reply, Unavailable):
            self._view.failed(lane.replica.id)
            for job in message.jobs:
                self._again(job, reply)
        elif isinstance(reply, ExpertMeshError):
            for job in message.jobs:
                self._tell(job, reply)
        else:
            seconds = asyncio.get_running_loop().time() - message.started
            self._telemetry.replied(lane.replica.id, reply.queued, reply.computed)
            for job, place in zip(message.jobs, message.places, strict=True):
                self._deliver(job, _answer(reply, place), seconds)

    def _ended(self, message: _Message) -> None:
        """A message is over: its lane has room for another."""
        name = message.replica.id
        lane = self._lanes.get(name)
        if lane is not None and message in lane.under_way:
            lane.under_way.discard(message)
            self._pump(name, lane)

    def _deliver(self, job: Job, answer: Result, seconds: float) -> None:
        if isinstance(answer, VersionGone):
            self._again(job, answer)
        elif isinstance(answer, ExpertMeshError):
            self._telemetry.errors[job.work.experts[0][0]] += 1
            self._tell(job, answer)
        else:
            for (expert, _, rows), output in zip(job.work.experts, answer.outputs, strict=True):
                if isinstance(output, ExpertMeshError):
                    self._telemetry.errors[expert] += 1
                else:
                    self._telemetry.computed(expert, rows, seconds)
            self._tell(job, answer)

    def _tell(self, job: Job, result: Result) -> None:
        if not job.over:
            job.over = True
            self._leave(job)
            job.done(result)

    def _replaced(self, name: str, jobs: Iterable[Job]) -> None:
        """Send again what was with an incarnation that is no more; its successor may well take it."""
        for job in jobs:
            job.tried.discard(name)
            self._again(job, Unavailable("the replica was replaced"))

    def _again(self, job: Job, error: ExpertMeshError) -> None:
        """Inference is idempotent, so rows whose answer was lost are simply sent to another replica."""
        if job.over:
            return
        self._telemetry.errors[job.work.experts[0][0]] += 1
        self._leave(job)
        if job.attempts >= MAX_ATTEMPTS:
            self._tell(job, Unavailable(f"{job.work.experts[0][0]} did not answer: {error.message}"))
            return
        self._telemetry.retries += 1
        self._place(job)

    def _leave(self, job: Job) -> None:
        if job.at is not None:
            self._view.sent(job.at, -job.work.size)
            job.at = None


def _answer(reply: ExpertReply, place: Place) -> Answered | ExpertMeshError:
    """What a reply says of one of the jobs of its message."""
    if len(reply.outputs) != place.all_parts or len(reply.sums) != place.all_sums:
        return DataLoss(f"a replica answered {len(reply.outputs)} of {place.all_parts} parts of a message")
    outputs = tuple(_output(output) for output in reply.outputs[place.parts])
    gone = next((output for output in outputs if isinstance(output, VersionGone)), None)
    if gone is not None:  # all of it goes to one replica, or none
        return gone
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

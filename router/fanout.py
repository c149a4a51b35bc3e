"""Fan-out: rows to the replicas that hold them, few messages, and another try elsewhere when a replica is lost.

Every replica has a lane: at most `WINDOW` messages are under way to it, and what comes in the meantime waits and goes
together in the next one. So a slow expert holds up only those who need it, and waiting work can still be dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..experts.errors import BY_NAME, DataLoss, ExpertMeshError, Unavailable, VersionGone
from ..experts.protocol import ExpertCall, ExpertReply, Part, PartFailure
from .replicas import View
from .telemetry import Telemetry
from .transport import Transport

WINDOW = 2
MAX_ROWS_PER_MESSAGE = 16_384
MAX_ATTEMPTS = 3
log = logging.getLogger(__name__)

Run = Callable[..., Awaitable[Any]]
"""Runs a function of torch off the event loop: `await run(function, *arguments)`."""


@dataclass(eq=False)
class Job:
    """Rows `x[rows]` for one expert at one version; `answer` gets [len(rows), ...] or the reason why not."""

    expert: str
    version: str
    x: Tensor
    rows: Tensor
    answer: asyncio.Future[Tensor]
    attempts: int = 0
    tried: set[str] = field(default_factory=set)
    at: str | None = None

    @property
    def size(self) -> int:
        return int(self.rows.shape[0])


@dataclass(eq=False)
class _Lane:
    incarnation: str
    waiting: deque[Job] = field(default_factory=deque)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def take(self) -> list[Job]:
        """The jobs of the next message: in order of arrival, up to the row limit, without those nobody waits for."""
        taken: list[Job] = []
        rows = 0
        while self.waiting and (not taken or rows + self.waiting[0].size <= MAX_ROWS_PER_MESSAGE):
            job = self.waiting.popleft()
            if not job.answer.done() and (not taken or _alike(job, taken[0])):
                taken.append(job)
                rows += job.size
            elif not job.answer.done():
                self.waiting.appendleft(job)
                break
        return taken


class Fanout:
    """Sends jobs to replicas through a transport, as the view says."""

    def __init__(self, transport: Transport, view: View, telemetry: Telemetry, run: Run) -> None:
        self._transport = transport
        self._view = view
        self._telemetry = telemetry
        self._run = run
        self._lanes: dict[str, _Lane] = {}
        self._attempts = itertools.count()
        self._name = uuid.uuid4().hex[:8]

    def submit(self, expert: str, version: str, x: Tensor, rows: Tensor) -> asyncio.Future[Tensor]:
        """Send rows of `x` [T, ...] to a replica of an expert.

        The future gives [len(rows), ...], or raises Unavailable, VersionGone, ExpertFailed or SpecMismatch. Cancelling
        it takes the rows out of the queue if they still wait.
        """
        job = Job(expert, version, x, rows, asyncio.get_running_loop().create_future())
        job.answer.add_done_callback(lambda _: self._leave(job))
        self._place(job)
        return job.answer

    def refresh(self) -> None:
        """Look at the view again: what was sent to an incarnation that is no more, or is dead, is sent elsewhere."""
        now = {replica.id: replica.incarnation for replica in self._view.replicas() if replica.state != "restarting"}
        for name, lane in list(self._lanes.items()):
            if now.get(name) != lane.incarnation:
                del self._lanes[name]
                for task in lane.tasks:
                    task.cancel()
                self._replaced(name, lane.waiting)

    def waiting(self) -> dict[str, int]:
        """Rows that wait for their turn, by replica."""
        # Copies first: the metrics page asks from a thread of its own.
        return {name: sum(job.size for job in list(lane.waiting)) for name, lane in list(self._lanes.items())}

    def _place(self, job: Job) -> None:
        try:
            name = self._view.choose(job.expert, job.version, exclude=job.tried)
        except ExpertMeshError as error:
            job.answer.set_exception(error)
            return
        job.tried.add(name)
        job.attempts += 1
        lane = self._lanes.get(name)
        if lane is None:
            incarnation = next(replica.incarnation for replica in self._view.replicas() if replica.id == name)
            lane = self._lanes[name] = _Lane(incarnation)
        lane.waiting.append(job)
        job.at = name
        self._view.sent(name, job.size)
        if len(lane.tasks) < WINDOW:
            # Not at once: what is submitted in this turn of the loop goes together.
            asyncio.get_running_loop().call_soon(self._pump, name, lane)

    def _pump(self, name: str, lane: _Lane) -> None:
        while len(lane.tasks) < WINDOW and self._lanes.get(name) is lane:
            jobs = lane.take()
            if not jobs:
                return
            task = asyncio.get_running_loop().create_task(self._exchange(name, jobs))
            lane.tasks.add(task)
            task.add_done_callback(lambda done: self._returned(name, lane, done))

    def _returned(self, name: str, lane: _Lane, task: asyncio.Task[None]) -> None:
        lane.tasks.discard(task)
        self._pump(name, lane)

    async def _exchange(self, name: str, jobs: list[Job]) -> None:
        clock = asyncio.get_running_loop().time
        attempt = f"{self._name}-{next(self._attempts)}"
        try:
            call = await self._run(build_call, attempt, jobs)
            started = clock()
            self._telemetry.messages[name] += 1
            reply = await self._transport.send(name, call)
        except asyncio.CancelledError:
            self._replaced(name, jobs)
        except Unavailable as error:
            self._view.failed(name)
            self._all_again(jobs, error)
        except ExpertMeshError as error:
            _fail(jobs, error)
        except Exception as error:  # the border to the transport: whatever it raises, nobody may wait for ever
            log.exception("message failed", extra={"replica": name, "attempt": attempt})
            _fail(jobs, ExpertMeshError(f"the rows could not be sent ({type(error).__name__}); see the router's log"))
        else:
            self._deliver(jobs, reply, clock() - started)

    def _deliver(self, jobs: list[Job], reply: ExpertReply, seconds: float) -> None:
        if len(reply.outputs) != len(jobs):
            _fail(jobs, DataLoss(f"a replica answered {len(reply.outputs)} of {len(jobs)} parts of a message"))
            return
        for job, output in zip(jobs, reply.outputs, strict=True):
            if isinstance(output, PartFailure):
                self._refused(job, output)
            else:
                self._telemetry.computed(job.expert, job.size, seconds)
                if not job.answer.done():
                    job.answer.set_result(output)

    def _refused(self, job: Job, failure: PartFailure) -> None:
        error = BY_NAME.get(failure.error, ExpertMeshError)(failure.message)
        if isinstance(error, VersionGone):
            self._again(job, error)
            return
        self._telemetry.errors[job.expert] += 1
        _fail([job], error)

    def _replaced(self, name: str, jobs: Iterable[Job]) -> None:
        """Send again what was with an incarnation that is no more; its successor may well take it."""
        for job in jobs:
            job.tried.discard(name)
            self._again(job, Unavailable("the replica was replaced"))

    def _all_again(self, jobs: Iterable[Job], error: ExpertMeshError) -> None:
        for job in jobs:
            self._again(job, error)

    def _again(self, job: Job, error: ExpertMeshError) -> None:
        """Inference is idempotent, so rows whose answer was lost are simply sent to another replica."""
        if job.answer.done():
            return
        self._telemetry.errors[job.expert] += 1
        self._leave(job)
        if job.attempts >= MAX_ATTEMPTS:
            _fail([job], Unavailable(f"{job.expert} did not answer: {error.message}"))
            return
        self._telemetry.retries += 1
        self._place(job)

    def _leave(self, job: Job) -> None:
        if job.at is not None:
            self._view.sent(job.at, -job.size)
            job.at = None


def build_call(attempt: str, jobs: list[Job]) -> ExpertCall:
    """One message for several jobs: rows that more than one job of a batch needs are sent once."""
    parts: list[Part] = []
    rows: list[Tensor] = []
    index: list[Tensor] = []
    pairs = offset = 0
    for _, group in itertools.groupby(jobs, key=lambda job: id(job.x)):
        members = list(group)
        wanted, where = _shared_rows(members)
        rows.append(members[0].x.index_select(0, wanted))
        index.append(where + offset)
        offset += int(wanted.shape[0])
        for job in members:
            parts.append(Part(job.expert, job.version, pairs, pairs + job.size))
            pairs += job.size
    joined = rows[0] if len(rows) == 1 else torch.cat(rows)
    return ExpertCall(attempt, tuple(parts), joined, index[0] if len(index) == 1 else torch.cat(index))


def _shared_rows(jobs: list[Job]) -> tuple[Tensor, Tensor]:
    if len(jobs) == 1:
        return jobs[0].rows, torch.arange(jobs[0].size)
    wanted, where = torch.unique(torch.cat([job.rows for job in jobs]), return_inverse=True)
    return wanted, where


def _alike(job: Job, other: Job) -> bool:
    return job.x.dtype == other.x.dtype and job.x.shape[1:] == other.x.shape[1:]


def _fail(jobs: Iterable[Job], error: ExpertMeshError) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_exception(error)

"""Fan-out: sends the work of a batch to replicas in few messages, and again if a replica is lost or late.

Every replica has a lane with at most `WINDOW` messages in flight. Work that arrives meanwhile waits and goes together
in the next message. So a slow expert delays only the requests that need it, and waiting work can still be dropped.

If a replica is late, its work is sent to another one as well, and the first answer counts; what it is computing only if
its process does not respond. If it dies, its work is sent again, unless two replicas died while they computed it; rows
of several requests are not sent again together, because those of one may have killed it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor

from ...experts.errors import ExpertFailed, ExpertMeshError, Unavailable, VersionGone
from ...experts.protocol import ExpertReply
from ..epochs.epochs import Epoch
from ..gates import Routing
from ..mixture.dispatch import Dispatch
from ..mixture.layer import Layer
from .answers import Answered, DiedTogether, Result
from .batch import Batch
from .lane import Job, Lane, Message
from .lateness import HedgeBudget, Pace
from .message import answer_at, build_call
from .replica_view import GONE, View
from .telemetry import ReplicaLoad, Telemetry
from .transport import Died, Transport, sending_error
from .work import Work, assign

WINDOW = 2
MAX_ATTEMPTS = 3
MAX_DEATHS = 2
CHECK_SECONDS = 0.025
"""How often messages in flight are compared with the pace of their replicas."""
ASK_SECONDS = 0.5
"""How often at most a late replica is asked whether its process runs."""


class Fanout:
    """Sends work through a transport to the replicas that the view chooses."""

    def __init__(self, transport: Transport, view: View, telemetry: Telemetry) -> None:
        self._transport = transport
        self._view = view
        self._telemetry = telemetry
        self._lanes: dict[str, Lane] = {}
        self._to_flush: dict[str, Lane] = {}
        self._attempts = itertools.count(1)
        self._paces: defaultdict[tuple[str, ...], Pace] = defaultdict(Pace)
        self._budget = HedgeBudget()
        self._check: asyncio.TimerHandle | None = None
        self._asking: set[asyncio.Task[None]] = set()

    def start(
        self,
        epoch: Epoch,
        layer: Layer,
        x: Tensor,
        routing: Routing,
        handle: Dispatch,
        *,
        deadline: float,
        client: str,
        merged: bool = False,
        died: Mapping[int, DiedTogether] | None = None,
    ) -> Batch:
        """Send the rows `x` [T, ...] of a batch to the experts that `handle` names. The caller holds the batch.

        `deadline` is in event-loop time; `client` sent the rows ("" for several), which are `merged` if they belong to
        several requests. `died` is what became of the rows when they were sent before, by the position of the expert.
        """
        assignment = assign(layer, epoch.versions, x, handle, deadline=deadline, client=client, merged=merged)
        batch = Batch(epoch, layer, x, routing, handle, assignment)
        owner = assignment.owner
        before = {owner[expert]: result for expert, result in (died or {}).items() if expert in owner}
        jobs = [self.submit(work, partial(batch.answer, key), before.get(key)) for key, work in assignment.work.items()]
        if not batch.answers.complete:
            batch.cancel = partial(self._cancel_all, jobs)
        self.flush()
        self._telemetry.batches[layer.name] += 1
        self._telemetry.add_gate_mass(layer.expert_ids, handle.mass())
        return batch

    def submit(self, work: Work, done: Callable[[Result], None], died: DiedTogether | None = None) -> Job:
        """Send work to a replica; `done` gets the answer, or an error if no replica could do the work.

        The failure of a single expert is part of the answer. `died` is what became of the rows when they were sent
        together with those of others.
        """
        job = Job(work, done) if died is None else Job(work, done, deaths=died.deaths, tried=set(died.tried))
        self._enqueue(job)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job: rows that still wait are not sent, and `done` is not called."""
        if job.finished:
            return
        job.finished = True
        self._uncount(job)
        self._drop_messages(job)

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
        if isinstance(result, Answered):
            return result
        raise result if isinstance(result, ExpertMeshError) else Unavailable("its replica died; retry")

    def refresh(self) -> None:
        """Compare the lanes with the view: work for an incarnation that is gone or restarting is sent again."""
        incarnations = {
            replica.id: replica.incarnation for replica in self._view.replicas() if replica.state not in GONE
        }
        for name, lane in list(self._lanes.items()):
            if incarnations.get(name) != lane.replica.incarnation:
                self._give_up(lane, replaced=True)

    def waiting(self) -> dict[str, int]:
        """The rows that wait in each lane, by replica."""
        # Iterate over copies: the metrics page reads this from another thread.
        return {name: sum(job.work.size for job in lane.waiting.items()) for name, lane in list(self._lanes.items())}

    def loads(self) -> dict[str, ReplicaLoad]:
        """What each replica was given, and what waits for it."""
        now, load = asyncio.get_running_loop().time(), self._telemetry.replica_load
        return {name: load(name, *lane.waits(now)) for name, lane in self._lanes.items()}

    def _enqueue(self, job: Job) -> None:
        try:
            replica = self._view.choose(job.work.versions, exclude=job.tried)
        except ExpertMeshError as error:
            self._finish(job, error)
            return
        name = replica.id
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(replica)
        lane.put(job, asyncio.get_running_loop().time())
        job.tried.add(name)
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

    def _fill(self, name: str, lane: Lane) -> None:
        while len(lane.in_flight) < WINDOW and self._lanes.get(name) is lane:
            jobs = lane.take()
            if not jobs:
                return
            self._send(lane, jobs)

    def _send(self, lane: Lane, jobs: list[Job]) -> None:
        loop = asyncio.get_running_loop()
        ahead = sum(job.work.size for message in lane.in_flight for job in message.jobs)
        message = Message(lane.replica, jobs, ahead + sum(job.work.size for job in jobs), loop.time())
        works = [job.work for job in jobs]
        lane.in_flight.append(message)
        for job in jobs:
            job.attempts += 1
            job.messages.append(message)
        try:
            call, message.places = build_call(next(self._attempts), works, now=message.started)
            message.cancel = self._transport.send(lane.replica, call, partial(self._returned, lane, message))
        except Exception as error:  # noqa: BLE001 (the message cannot be encoded, or memory runs out)
            self._remove(lane, message)
            failure = sending_error(error)
            for job in jobs:
                self._finish(job, failure)
            return
        self._budget.sent()
        if self._check is None:
            self._check = loop.call_later(CHECK_SECONDS, self._check_lanes)
        rows = message.rows - ahead
        waited = sum(job.work.size * (message.started - job.since) for job in jobs)
        self._telemetry.count_message(lane.replica.id, rows, waited)
        self._telemetry.copied += 0 if call.rows is works[0].x else call.rows.nbytes

    def _returned(self, lane: Lane, message: Message, reply: ExpertReply | ExpertMeshError | Died) -> None:
        if message not in lane.in_flight or self._lanes.get(lane.replica.id) is not lane:
            return  # it was cancelled, or its lane was dropped
        if isinstance(reply, Died):
            self._view.failed(lane.replica.id)
            self._give_up(lane, replaced=False)
            return
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
            self._paces[lane.replica.experts].took(seconds, message.rows)
            rows = sum(job.work.size for job in message.jobs)
            self._telemetry.add_message_seconds(lane.replica.id, rows, reply.queued, reply.computed)
            for job, place in zip(message.jobs, message.places, strict=True):
                self._deliver(job, answer_at(place, reply), seconds)

    def _close(self, message: Message) -> None:
        """Remove a finished message from its lane, which has room for another."""
        name = message.replica.id
        lane = self._lanes.get(name)
        if lane is not None and message in lane.in_flight:
            self._remove(lane, message)
            self._fill(name, lane)

    def _remove(self, lane: Lane, message: Message) -> None:
        lane.in_flight.remove(message)
        for job in message.jobs:
            job.messages.remove(message)
        if message.late and not any(other.late for other in lane.in_flight):
            self._view.answered(lane.replica.id)

    def _drop_messages(self, job: Job) -> None:
        """Cancel the messages of a finished job that nobody waits for any more.

        A late one stays in flight: its answer says that the replica is back.
        """
        for message in list(job.messages):
            if not message.late and all(other.finished for other in message.jobs):
                message.cancel()
                self._close(message)

    def _give_up(self, lane: Lane, *, replaced: bool) -> None:
        """Send the work of a replica that has died again; if it is replaced, its successor may take it.

        The replica was computing the oldest message, whose jobs may have killed it.
        """
        name = lane.replica.id
        del self._lanes[name]
        jobs = {id(job): job for message in lane.in_flight for job in message.jobs}
        for job in lane.in_flight[0].jobs if lane.in_flight else ():
            job.deaths += 1
        for message in list(lane.in_flight):
            message.cancel()
            self._remove(lane, message)
        for job in [*jobs.values(), *lane.waiting.drain()]:
            if replaced:
                job.tried.discard(name)
            self._retry(job, Unavailable("the replica was replaced" if replaced else "its replica died; retry"))

    def _check_lanes(self) -> None:
        """Look for messages that are late, for as long as any is in flight."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for lane in list(self._lanes.values()):
            message = next((message for message in lane.in_flight if not message.late), None)
            if message is not None and self._paces[lane.replica.experts].is_late(
                now - message.started, message.rows, min(job.work.deadline for job in message.jobs) - message.started
            ):
                self._hedge(lane)
            if lane.in_flight and lane.in_flight[0].late and now - lane.asked >= ASK_SECONDS:
                self._ask(lane)
        busy = any(lane.in_flight for lane in self._lanes.values())
        self._check = loop.call_later(CHECK_SECONDS, self._check_lanes) if busy else None

    def _hedge(self, lane: Lane) -> None:
        """Send the work of a late replica to other ones as well, where any are, and choose it less from now on."""
        name = lane.replica.id
        works = (job.work for message in lane.in_flight for job in message.jobs if not job.finished)
        if not any(self._view.has_other(work.versions, {name}) for work in works) or not self._budget.take():
            return
        self._view.late(name)
        for message in lane.in_flight:
            message.late = True
        computing = lane.in_flight[0]
        behind = [job for job in self._with_another(lane, lane.in_flight) if computing not in job.messages]
        self._ask(lane)
        self._send_elsewhere(lane, behind)

    def _ask(self, lane: Lane) -> None:
        """Ask a late replica whether its process runs, if another one could do what it computes."""
        if self._with_another(lane, lane.in_flight[:1]):
            lane.asked = math.inf  # until it is known
            task = asyncio.get_running_loop().create_task(self._hedge_unless_it_responds(lane, lane.in_flight[0]))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _hedge_unless_it_responds(self, lane: Lane, computing: Message) -> None:
        """What a process that runs is computing goes to no other: it would take as long there, or hang there too."""
        responds = await self._transport.responds(lane.replica)
        lane.asked = asyncio.get_running_loop().time()
        if not responds and computing in lane.in_flight:
            self._send_elsewhere(lane, self._with_another(lane, [computing]))

    def _with_another(self, lane: Lane, messages: Iterable[Message]) -> list[Job]:
        """The unfinished jobs of messages to a replica that another one could do, and that none was given as well."""
        jobs = {id(job): job for message in messages for job in message.jobs if not job.finished}
        name = lane.replica.id
        return [
            job
            for job in jobs.values()
            if len(job.messages) == 1
            and job.replica_id in (None, name)
            and self._view.has_other(job.work.versions, {name, *job.tried})
        ]

    def _send_elsewhere(self, lane: Lane, sent: Iterable[Job]) -> None:
        """Send jobs of a late replica, and what still waits for it, to other ones."""
        for job in [*sent, *lane.waiting.drain()]:
            if job.finished:
                continue
            self._uncount(job)
            if any(message.replica is lane.replica for message in job.messages):
                self._telemetry.hedges += 1
            else:
                job.tried.discard(lane.replica.id)  # it was never sent, and may have to wait here again
            self._enqueue(job)

    def _deliver(self, job: Job, answer: Answered | ExpertMeshError, seconds: float) -> None:
        if job.finished:
            return
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
            self._drop_messages(job)
            job.done(result)

    def _retry(self, job: Job, error: ExpertMeshError) -> None:
        """Send a job whose answer was lost to another replica; inference is idempotent."""
        if job.finished:
            return
        self._telemetry.errors[job.work.experts[0][0]] += 1
        self._uncount(job)
        again = job.deaths < MAX_DEATHS and job.attempts < MAX_ATTEMPTS
        if any(not message.late for message in job.messages) or (
            job.messages and not (again and self._view.has_other(job.work.versions, job.tried))
        ):
            return  # another replica computes it already, or nobody but a late one can
        if job.deaths >= MAX_DEATHS:
            self._finish(job, _deadly(job.work))
        elif job.attempts >= MAX_ATTEMPTS:
            self._finish(job, Unavailable(f"{job.work.experts[0][0]} did not answer: {error.message}"))
        else:
            self._telemetry.retries += 1
            if job.deaths and job.work.merged:
                self._finish(job, DiedTogether(job.deaths, frozenset(job.tried)))
            else:
                self._enqueue(job)

    def _uncount(self, job: Job) -> None:
        if job.replica_id is not None:
            self._view.sent(job.replica_id, -job.work.size)
            job.replica_id = None


def _deadly(work: Work) -> ExpertFailed:
    names = ", ".join(expert for expert, _, _ in work.experts)
    whose = names if len(work.experts) == 1 else f"one of the experts {names}"
    return ExpertFailed(
        f"{whose} ended its process: {MAX_DEATHS} replicas died while they computed these rows, which are not sent to "
        "another; see the log, and fix the expert"
    )

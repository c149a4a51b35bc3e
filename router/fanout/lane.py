"""The lane of a replica: the work that waits for it, and the messages in flight to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .answers import Result
from .fair_queue import FairQueue
from .message import Place, same_kind
from .replica_view import Replica
from .work import Work

MAX_ROWS_PER_MESSAGE = 16_384
MAX_PARTS_PER_MESSAGE = 256


@dataclass(eq=False)
class Job:
    """One piece of work; `done` gets its answer or error, once.

    `attempts` counts the messages that it went into, of which `messages` are in flight, and `deaths` the replicas that
    died while they computed it. It waits for its replica since `since`, in event-loop time.
    """

    work: Work
    done: Callable[[Result], None]
    finished: bool = False
    since: float = 0.0
    attempts: int = 0
    deaths: int = 0
    tried: set[str] = field(default_factory=set)
    replica_id: str | None = None
    messages: list[Message] = field(default_factory=list)


@dataclass(eq=False)
class Message:
    """Jobs in flight together; `rows` counts also those of messages in front of it. A `late` one is past its bound."""

    replica: Replica
    jobs: list[Job]
    rows: int
    started: float
    places: list[Place] = field(default_factory=list)
    late: bool = False
    cancel: Callable[[], object] = lambda: None


@dataclass(eq=False)
class Lane:
    """The jobs that wait for a replica, and the messages in flight to it, oldest first.

    `asked` is when it was last asked whether it runs, in event-loop time; infinite while it is being asked.
    """

    replica: Replica
    waiting: FairQueue[Job] = field(default_factory=FairQueue)
    in_flight: list[Message] = field(default_factory=list)
    asked: float = -math.inf

    def put(self, job: Job, now: float) -> None:
        """Let a job wait for the replica, from `now` on."""
        job.since = now
        self.waiting.put(job.work.client, job)

    def waits(self, now: float) -> tuple[int, float]:
        """The rows that wait, and how long all of them together have waited so far, in seconds."""
        jobs = [job for job in self.waiting.items() if not job.finished]
        return sum(job.work.size for job in jobs), sum(job.work.size * (now - job.since) for job in jobs)

    def take(self) -> list[Job]:
        """Take the jobs of the next message: clients in turns, up to the row and part limits, no cancelled jobs.

        One that may have killed a replica goes alone.
        """
        taken: list[Job] = []
        rows = parts = 0
        while (job := self.waiting.peek()) is not None:
            rows, parts = rows + job.work.size, parts + len(job.work.experts)
            if job.finished:
                rows, parts = rows - job.work.size, parts - len(job.work.experts)
            elif taken and (
                rows > MAX_ROWS_PER_MESSAGE
                or parts > MAX_PARTS_PER_MESSAGE
                or not same_kind(job.work, taken[0].work)
                or job.deaths
                or taken[0].deaths
            ):
                break
            else:
                taken.append(job)
            self.waiting.pop()
        return taken

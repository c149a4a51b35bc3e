"""The interface between router and replicas, and its base case: the in-process transport."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from ...experts.errors import ExpertMeshError, Unavailable
from ...experts.host import ExpertHost
from ...experts.protocol import ExpertCall, ExpertReply, TrainCall, TrainReply
from .replica_view import READY, Replica

log = logging.getLogger(__name__)
HUNG_SECONDS = 5.0
"""How long an expert may compute beyond the deadline of its call before its replica is not chosen any more."""


@dataclass(frozen=True)
class Died:
    """In place of a reply: the replica was lost after the call had been sent to it, perhaps because of the call."""


Done = Callable[[ExpertReply | ExpertMeshError | Died], None]
Trained = Callable[[TrainReply | ExpertMeshError | Died], None]
Cancel = Callable[[], object]
Lost = Callable[[Replica], None]


class Transport(Protocol):
    """Carries one message to one replica and returns its reply.

    `carried` counts the rows that were sent, by route ("local", "unix", "tcp" or "ray").
    """

    carried: Counter[str]

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Send a call; `done` gets its reply once, later, on the event loop.

        It gets Unavailable if this incarnation cannot be reached, and Died if it is lost with the call. After a
        cancellation there is no reply, and the replica may skip what it has not computed yet.
        """

    def train(self, replica: Replica, call: TrainCall, done: Trained) -> Cancel:
        """Send a message of training, as `send` does."""

    async def responds(self, replica: Replica) -> bool:
        """Whether the process of a replica runs, whatever its experts do; within a second at most."""

    def identify(self, router: str, refused: Callable[[], None]) -> None:
        """Be this router to replicas from now on; what was connected as another is disconnected.

        `refused` is called where a replica serves this router no longer, because the controller has given it up.
        """

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Take a full report of the replicas: connect to new incarnations, and close the connections to all others.

        `lost` is called for a replica that is lost while no message is in flight to it.
        """

    def close(self) -> None:
        """Disconnect from every replica; idempotent."""


class LocalTransport:
    """Runs replicas as hosts in this process, each in one thread, so that a slow expert does not delay the others."""

    def __init__(self) -> None:
        self.carried: Counter[str] = Counter()
        self._hosts: dict[str, ExpertHost] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def add(self, replica_id: str, host: ExpertHost) -> None:
        """Make a host reachable as a replica."""
        self._hosts[replica_id] = host
        self._threads[replica_id] = ThreadPoolExecutor(1, thread_name_prefix=f"expert-{replica_id}")

    def remove(self, replica_id: str) -> None:
        """Remove a replica; it still finishes the message that it is computing."""
        self._hosts.pop(replica_id, None)
        thread = self._threads.pop(replica_id, None)
        if thread is not None:
            thread.shutdown(wait=False)

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Compute the call in the thread of the host."""
        return self._run(replica, lambda host: host.compute(call), call.size, done)

    def train(self, replica: Replica, call: TrainCall, done: Trained) -> Cancel:
        """Carry out a message of training in the thread of the host."""
        return self._run(replica, lambda host: host.train(call), call.size, done)

    def _run(
        self, replica: Replica, work: Callable[[ExpertHost], Any], rows: int, done: Callable[[Any], None]
    ) -> Cancel:
        loop = asyncio.get_running_loop()
        host, thread = self._hosts.get(replica.id), self._threads.get(replica.id)
        try:
            if host is None or thread is None:
                raise RuntimeError
            answer = loop.run_in_executor(thread, work, host)
        except RuntimeError:  # the host was removed, perhaps by another thread just now
            return loop.call_soon(done, Unavailable("the replica is gone; retry")).cancel
        self.carried["local"] += rows
        answer.add_done_callback(lambda future: _deliver(future, done))
        return answer.cancel

    async def responds(self, replica: Replica) -> bool:
        """True: it is this process."""
        return True

    def identify(self, router: str, refused: Callable[[], None]) -> None:
        """Nothing to tell: replicas of this process cannot outlive what they know of its routers."""

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Nothing to connect: `add` and `remove` manage the hosts."""

    def close(self) -> None:
        """Stop every thread; idempotent."""
        for replica_id in list(self._hosts):
            self.remove(replica_id)


def report_of(replica_id: str, host: ExpertHost, cure: str, **where: Any) -> Replica:
    """What a replica whose host is in this process says of itself; `where` are fields that say where that is.

    `cure` says what ends an expert that does not return; until then the replica is not chosen. It serves on while it is
    only a new version that does not return.
    """
    overdue = host.overdue(HUNG_SECONDS)
    state = READY if overdue is None or overdue.staging else "hung"
    problem = "" if overdue is None else f"{overdue}: {cure}"
    known: dict[str, Any] = {"incarnation": host.incarnation, "holds": host.holds(), "pid": os.getpid()}
    return Replica(replica_id, state=state, problem=problem, **known, **where)


def in_task(exchange: Coroutine[Any, Any, ExpertReply | Died], done: Done) -> Cancel:
    """Implement `send` for a transport that awaits its replies: run the exchange as a task."""
    task = asyncio.get_running_loop().create_task(exchange)
    task.add_done_callback(lambda future: _deliver(future, done))
    return task.cancel


def _deliver(future: asyncio.Future[Any], done: Callable[[Any], None]) -> None:
    """The border to hosts and foreign libraries: whatever they raise ends the wait of the requests."""
    if future.cancelled():
        return
    error = future.exception()
    done(future.result() if error is None else sending_error(error))


def sending_error(error: BaseException) -> ExpertMeshError:
    """The error to return for an exception on the way to a replica; one that is not an ExpertMeshError is logged."""
    if isinstance(error, ExpertMeshError):
        return error
    log.error("message failed", exc_info=error)
    return ExpertMeshError(f"the rows could not be sent ({type(error).__name__}); see the log of the router")

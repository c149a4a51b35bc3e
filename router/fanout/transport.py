"""The seam between router and replicas: one method. The in-process transport is the base case and ships here."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ...experts.errors import ExpertMeshError, Unavailable
from ...experts.host import ExpertHost
from ...experts.protocol import ExpertCall, ExpertReply
from .replica_view import Replica

log = logging.getLogger(__name__)

Done = Callable[[ExpertReply | ExpertMeshError], None]
Cancel = Callable[[], object]
Lost = Callable[[Replica], None]


class Transport(Protocol):
    """Carries one message to one replica and brings its reply.

    `carried` counts the rows that went each way, by the way's name.
    """

    carried: Counter[str]

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Send a call; `done` gets its reply once, later, on the event loop.

        It gets Unavailable when this incarnation is not there or dies before it answers. Cancelled, a message has no
        reply, and what of it was not computed yet may be left out.
        """

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Take a full report of the replicas, to connect to those that are new and to no others.

        `lost` is called for a replica whose loss is noticed while no message is under way to it.
        """

    def close(self) -> None:
        """Let go of every replica; idempotent."""


class LocalTransport:
    """Replicas as hosts in this process, each with one thread, so that slow experts do not wait for each other."""

    def __init__(self, hosts: Mapping[str, ExpertHost] | None = None) -> None:
        self.carried: Counter[str] = Counter()
        self._hosts: dict[str, ExpertHost] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        for replica_id, host in (hosts or {}).items():
            self.add(replica_id, host)

    def add(self, replica_id: str, host: ExpertHost) -> None:
        """Make a host reachable as a replica."""
        self._hosts[replica_id] = host
        self._threads[replica_id] = ThreadPoolExecutor(1, thread_name_prefix=f"expert-{replica_id}")

    def remove(self, replica_id: str) -> None:
        """Forget a replica; what it computes now it still finishes."""
        self._hosts.pop(replica_id, None)
        thread = self._threads.pop(replica_id, None)
        if thread is not None:
            thread.shutdown(wait=False)

    def send(self, replica: Replica, call: ExpertCall, done: Done) -> Cancel:
        """Compute in the thread of the host."""
        loop = asyncio.get_running_loop()
        host, thread = self._hosts.get(replica.id), self._threads.get(replica.id)
        try:
            if host is None or thread is None:
                raise RuntimeError
            answer = loop.run_in_executor(thread, host.compute, call)
        except RuntimeError:  # it was removed, perhaps by another thread just now
            return loop.call_soon(done, Unavailable("the replica is gone; retry")).cancel
        self.carried["local"] += int(call.rows.shape[0])
        answer.add_done_callback(lambda answered: _tell(answered, done))
        return answer.cancel

    def refresh(self, replicas: Iterable[Replica], lost: Lost) -> None:
        """Nothing to connect: hosts are added and removed by whoever made them."""

    def close(self) -> None:
        """Stop every thread; idempotent."""
        for replica_id in list(self._hosts):
            self.remove(replica_id)


def in_task(exchange: Coroutine[Any, Any, ExpertReply], done: Done) -> Cancel:
    """`send` for a transport that awaits its replies: runs the exchange as a task."""
    task = asyncio.get_running_loop().create_task(exchange)
    task.add_done_callback(lambda answered: _tell(answered, done))
    return task.cancel


def _tell(answered: asyncio.Future[ExpertReply], done: Done) -> None:
    """The border to hosts and foreign libraries: whatever they raise, nobody may wait for ever."""
    if answered.cancelled():
        return
    error = answered.exception()
    done(answered.result() if error is None else sending_error(error))


def sending_error(error: BaseException) -> ExpertMeshError:
    """What those who wait are told of anything that was raised on the way to a replica; what is not ours is logged."""
    if isinstance(error, ExpertMeshError):
        return error
    log.error("message failed", exc_info=error)
    return ExpertMeshError(f"the rows could not be sent ({type(error).__name__}); see the router's log")

"""One call as a flow without I/O: which attempts to make, how long to pause between them, when to give up.

A flow is a generator. It yields an `Attempt` and receives the reply or the error; it yields `Work` and receives its
result; it yields a `Pause`, a `Beside` or a `Cut` and receives None. It returns the call's result or raises. The driver
of the flow owns the sockets, the threads and the sleep. A frame that is sent as it is, within a process, is answered by
a frame.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...experts.errors import DeadlineExceeded, ExpertMeshError, RouterUnavailable, Unavailable
from ...experts.wire import Buffer, Frame
from ..rpc.streams import Streamed
from .routers.balance import Route, Target

T = TypeVar("T")
Payload = bytes | Streamed | Frame
Received = Buffer | Frame


@dataclass(frozen=True)
class Attempt:
    """Send `payload`, one message or a stream of them, to `method` once, within `timeout` seconds.

    It goes to the router that `route` chooses when it is sent, which is told what came of it.
    """

    method: str
    payload: Payload = field(repr=False)
    timeout: float
    route: Route = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Pause:
    """Sleep for `seconds` before the flow continues."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Run `action`, which may wait for the disk; an exception ends the flow."""

    action: Callable[[], bytes]


@dataclass(frozen=True)
class Beside:
    """Run another flow beside this one, which goes on at once; the flow's errors are nobody's."""

    flow: Generator[Any, Any, None]


@dataclass(frozen=True)
class Cut:
    """Close the connection to a router, if there is one: what is in flight on it fails with RouterUnavailable."""

    target: Target


Step = Attempt | Pause | Work | Beside | Cut
Answer = Received | ExpertMeshError | None
Flow = Generator[Step, Answer, T]


def drive(flow: Flow[T], perform: Callable[[Step], Answer]) -> T:
    """Run a flow to its end; `perform` executes each step."""
    answer: Answer = None
    try:
        while True:
            answer = perform(flow.send(answer))
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        flow.close()


async def drive_async(flow: Flow[T], perform: Callable[[Step], Awaitable[Answer]]) -> T:
    """Like `drive`, with an asynchronous `perform`."""
    answer: Answer = None
    try:
        while True:
            answer = await perform(flow.send(answer))
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        flow.close()


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Retries of calls that fail with UNAVAILABLE: pauses double from `first_pause` to `longest_pause` seconds."""

    attempts: int = 3
    first_pause: float = 0.1
    longest_pause: float = 2.0

    def pause(self, retries: int, jitter: float) -> float:
        """Seconds to pause after `retries` retries; `jitter` in [0, 1) shortens the pause by up to half."""
        return min(self.longest_pause, self.first_pause * 2.0 ** min(retries, 60)) * (1.0 - jitter / 2.0)


class RetryBudget:
    """A token bucket that limits retries to `ratio` of the calls, so that retries never amplify an overload.

    A call deposits `ratio`, a retry takes 1. A new bucket starts with a loan of `reserve` tokens, which the first calls
    pay back: n calls have at most max(reserve, ratio * n) retries. Thread-safe.
    """

    def __init__(self, *, ratio: float = 0.1, reserve: float = 10.0) -> None:
        self._ratio = ratio
        self._reserve = self._tokens = self._debt = reserve
        self._lock = threading.Lock()

    def deposit(self) -> None:
        """Count one call."""
        with self._lock:
            if self._debt > 0:
                self._debt -= self._ratio
            else:
                self._tokens = min(self._reserve, self._tokens + self._ratio)

    def withdraw(self) -> bool:
        """Take the token for one retry; False if there is none."""
        with self._lock:
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True


@dataclass(frozen=True, kw_only=True)
class Retries:
    """The retry state of one client: policy, budget, clock (monotonic seconds) and jitter (uniform in [0, 1))."""

    policy: RetryPolicy
    budget: RetryBudget
    clock: Callable[[], float]
    jitter: Callable[[], float]

    def attempts(
        self,
        method: str,
        payload: Payload,
        route: Route,
        *,
        timeout: float,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Flow[Received]:
        """Retry until an answer or an error other than Unavailable comes, or attempts, budget or `timeout` run out.

        A call whose router cannot take it goes on to another one at once. That takes nothing from the budget: a router
        that failed is avoided, so each failure moves only the calls that were in flight there. It is no retry either,
        unless the router had answered before: a call may be what it died of.

        Raises the last error, or DeadlineExceeded.
        """
        deadline = self.clock() + timeout
        self.budget.deposit()
        retries = 0
        while True:
            remaining = deadline - self.clock()
            if remaining <= 0:
                raise DeadlineExceeded(f"no answer within {timeout:g} s")
            answer = yield Attempt(method, payload, remaining, route, metadata)
            if isinstance(answer, (bytes, memoryview, Frame)):
                return answer
            if answer is None:
                raise ExpertMeshError("an attempt ended without an answer")
            if route.losses >= self.policy.attempts:
                raise answer
            if isinstance(answer, RouterUnavailable) and route.can_move():
                continue
            pause = self.policy.pause(retries, self.jitter())
            if not self._may_retry(answer, retries, pause, deadline):
                raise answer
            yield Pause(pause)
            retries += 1

    def _may_retry(self, error: ExpertMeshError, retries: int, pause: float, deadline: float) -> bool:
        return (
            isinstance(error, Unavailable)
            and retries + 1 < self.policy.attempts
            and self.clock() + pause < deadline
            and self.budget.withdraw()
        )

"""One call as a flow without I/O: which attempts to make, how long to pause between them, when to give up.

A flow yields an `Attempt` and is sent the reply's bytes or the error; it yields `Work` and is sent what that returns;
it yields a `Pause` and is sent nothing. It returns its result or raises. Whoever drives it owns the socket, the threads
and the sleep.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

from ...experts.errors import DeadlineExceeded, ExpertMeshError, Unavailable
from ...experts.wire import Buffer
from ..rpc.streams import Streamed

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt:
    """Send `payload`, one message or a stream of them, to `method` once, within `timeout` seconds."""

    method: str
    payload: bytes | Streamed = field(repr=False)
    timeout: float
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Pause:
    """Wait for `seconds` before the flow goes on."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Run `action`, which may wait for the disk; what it raises ends the flow."""

    action: Callable[[], bytes]


Step = Attempt | Pause | Work
Answer = Buffer | ExpertMeshError | None
Flow = Generator[Step, Answer, T]


def drive(flow: Flow[T], perform: Callable[[Step], Answer]) -> T:
    """Run a flow to its end; `perform` makes each attempt, and each pause."""
    answer: Answer = None
    try:
        while True:
            answer = perform(flow.send(answer))
    except StopIteration as end:
        result: T = end.value
        return result


async def drive_async(flow: Flow[T], perform: Callable[[Step], Awaitable[Answer]]) -> T:
    """Like `drive`, where to perform a step is to await it."""
    answer: Answer = None
    try:
        while True:
            answer = await perform(flow.send(answer))
    except StopIteration as end:
        result: T = end.value
        return result


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How a call that was answered UNAVAILABLE is tried again: seconds double from `first_pause` to `longest_pause`."""

    attempts: int = 3
    first_pause: float = 0.1
    longest_pause: float = 2.0

    def pause(self, retries: int, jitter: float) -> float:
        """Seconds before the next retry after `retries` of them; `jitter` in [0, 1) takes up to half away."""
        return min(self.longest_pause, self.first_pause * 2.0 ** min(retries, 60)) * (1.0 - jitter / 2.0)


class RetryBudget:
    """A token bucket that keeps retries at `ratio` of the calls, so that a client never doubles the load of a bad day.

    A call deposits `ratio`, a retry takes 1. A fresh bucket is lent `reserve` tokens, which its first calls pay back:
    over any n calls there are never more than max(reserve, ratio * n) retries. Safe to share between threads.
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
        """Take the token for one retry; False when there is none."""
        with self._lock:
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True


@dataclass(frozen=True, kw_only=True)
class Retries:
    """What retries of one client share: policy, budget, clock (monotonic seconds) and jitter (uniform in [0, 1))."""

    policy: RetryPolicy
    budget: RetryBudget
    clock: Callable[[], float]
    jitter: Callable[[], float]

    def attempts(
        self,
        method: str,
        payload: bytes | Streamed,
        *,
        timeout: float,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Flow[Buffer]:
        """Try until an answer comes, the error is no Unavailable, or attempts, budget or `timeout` run out.

        Raises the last error that was sent in, or DeadlineExceeded.
        """
        deadline = self.clock() + timeout
        self.budget.deposit()
        retries = 0
        while True:
            left = deadline - self.clock()
            if left <= 0:
                raise DeadlineExceeded(f"no answer within {timeout:g} s")
            answer = yield Attempt(method, payload, left, metadata)
            if isinstance(answer, (bytes, memoryview)):
                return answer
            if answer is None:
                raise ExpertMeshError("an attempt ended without an answer")
            pause = self.policy.pause(retries, self.jitter())
            if not self._again(answer, retries, pause, deadline):
                raise answer
            yield Pause(pause)
            retries += 1

    def _again(self, error: ExpertMeshError, retries: int, pause: float, deadline: float) -> bool:
        return (
            isinstance(error, Unavailable)
            and retries + 1 < self.policy.attempts
            and self.clock() + pause < deadline
            and self.budget.withdraw()
        )

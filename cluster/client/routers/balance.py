"""Which router takes a call: of those that have not failed, the one with the fewest calls in flight.

A call asks for its `Route`, and each of its attempts is told: `begin` chooses a router, `end` says what came of it. A
router that failed is not chosen again before it has answered a check, unless all have failed. Checks are also due of
routers that owe an answer and are silent: a frozen process accepts calls and never answers. Nothing here sends or
waits; the clock is injected.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ....experts.errors import DeadlineExceeded, ExpertMeshError, Overloaded, RouterUnavailable
from ....experts.wire import Buffer, Frame

SILENT_SECONDS = 1.0
"""How long a router with calls in flight may answer none of them before it is checked."""

FIRST_CHECK_SECONDS = 0.25
LONGEST_CHECK_SECONDS = 5.0
"""A router that failed is checked after `FIRST_CHECK_SECONDS`, then after twice as long each time, up to this."""

WATCHED_SECONDS = 5.0
"""How long after the last call routers are still checked."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A router, and how gRPC reaches it.

    `address` ("host:port") names it, `connect_to` is what gRPC connects to: the address, or a Unix socket. `authority`
    is the name that its certificate must bear where the address is one of several of a name.
    """

    address: str
    connect_to: str
    loopback: bool = True
    authority: str | None = None


@dataclass
class Stay:
    """Calls that stay together: with the router `target` until it fails, and then with another one."""

    target: Target | None = None


class _Router:
    """What is known of a router.

    `chosen` and `failed` are turns: numbers of attempts, in the order of all routers. `owes_since` is when it last
    answered, or was first called since, in seconds; None if it owes no answer.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.in_flight = 0
        self.chosen = 0
        self.heard = False
        self.owes_since: float | None = None
        self.failed: int | None = None
        self.failures = 0
        self.check_at = 0.0
        self.full_until = 0.0


class Balance:
    """The routers of one client. Thread-safe; `clock` is in monotonic seconds, `shuffle` puts routers in any order.

    Clients begin with different routers, because each has shuffled them.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        clock: Callable[[], float],
        *,
        shuffle: Callable[[list[Target]], None] = random.shuffle,
    ) -> None:
        self._clock = clock
        self._shuffle = shuffle
        self._lock = threading.Lock()
        self._routers: dict[Target, _Router] = {}
        self._leaving: list[_Router] = []
        self._turn = 0
        self._used_at = 0.0
        self._watched = False
        self.replace(targets)

    def __len__(self) -> int:
        return len(self._routers)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The routers that calls go to."""
        return tuple(self._routers)

    def replace(self, targets: Iterable[Target]) -> list[Target]:
        """Set the routers; returns those that are no longer needed, now that their calls have ended. Never empty."""
        wanted = list(dict.fromkeys(targets))
        self._shuffle(wanted)
        with self._lock:
            known = {router.target: router for router in self._leaving} | self._routers
            self._routers = {
                target: known.pop(target) if target in known else _Router(target) for target in wanted or self.targets
            }
            leaving = list(known.values())
            self._leaving = [router for router in leaving if router.in_flight]
            return [router.target for router in leaving if not router.in_flight]

    def route(self, *, only: Target | None = None, stay: Stay | None = None) -> Route:
        """The route of one call: to `only` one router, or to that of the calls before that `stay`, or to any."""
        return Route(self, only, stay)

    def check(self, target: Target) -> Route:
        """The route of a check, which asks whether a router answers."""
        return Route(self, target, None, check=True)

    def due(self) -> list[Target]:
        """The routers to check now; each is due again only when another pause is over, or it is silent again."""
        with self._lock:
            now = self._clock()
            late = [router for router in self._routers.values() if self._is_due(router, now)]
            for router in late:
                router.check_at = now + LONGEST_CHECK_SECONDS  # until the check has ended
        return [router.target for router in late]

    def is_lost(self, target: Target) -> bool:
        """Whether a router has failed while another has not: what it has in flight had better go there."""
        with self._lock:
            router = self._routers.get(target)
            failed = router is not None and router.failed is not None
            return failed and any(other.failed is None for other in self._routers.values())

    def begin_watch(self) -> bool:
        """Whether a watch of the routers must begin: there are several, and none has begun."""
        if self._watched:
            return False
        with self._lock:
            begins, self._watched = not self._watched, True
            return begins

    def go_on_watching(self) -> bool:
        """Whether the routers are still to be watched; if not, the next call begins a watch."""
        with self._lock:
            in_flight = any(router.in_flight for router in (*self._routers.values(), *self._leaving))
            self._watched = in_flight or self._clock() - self._used_at < WATCHED_SECONDS
            return self._watched

    def end_watch(self) -> None:
        """A watch has ended, however it did."""
        with self._lock:
            self._watched = False

    def _is_due(self, router: _Router, now: float) -> bool:
        silent = router.owes_since is not None and now - router.owes_since >= SILENT_SECONDS
        return len(self._routers) > 1 and (silent or router.failed is not None) and now >= router.check_at

    def _best(self, now: float, tried: Iterable[Target], stay: Stay | None) -> _Router:
        if len(self._routers) == 1:
            return next(iter(self._routers.values()))

        def order(router: _Router) -> tuple[bool, bool, bool, bool, int, int]:
            target = router.target
            leaves = stay is not None and target != stay.target
            rank = (router.failed is not None, target in tried, now < router.full_until, leaves)
            return (*rank, router.in_flight, router.chosen)

        return min(self._routers.values(), key=order)


class Route:
    """The routers of one call: those that it `tried`, in order, and in `losses` how many of them it may have broken.

    Those are the ones that had answered before, and failed without a refusal, which would name the request.
    """

    def __init__(self, balance: Balance, only: Target | None, stay: Stay | None, *, check: bool = False) -> None:
        self.tried: list[Target] = []
        self.losses = 0
        self._balance = balance
        self._only = only
        self._stay = stay
        self._check = check

    def begin(self) -> Target:
        """Choose the router of the next attempt, which begins now; `end` must follow."""
        balance = self._balance
        with balance._lock:
            now = balance._clock()
            router = self._router = self._chosen(now)
            balance._turn += 1
            router.chosen = self._turn = balance._turn
            router.in_flight += 1
            self._heard = router.heard
            if router.owes_since is None:
                router.owes_since = now
            if not self._check:
                balance._used_at = now
        if self._stay is not None:
            self._stay.target = router.target
        self.tried.append(router.target)
        return router.target

    def end(self, answer: Buffer | Frame | ExpertMeshError | None) -> None:
        """Record the answer or the error of the attempt; None if it was cancelled."""
        unheard = answer is None or isinstance(answer, (DeadlineExceeded, RouterUnavailable))
        with self._balance._lock:
            router, now = self._router, self._balance._clock()
            router.in_flight -= 1
            if isinstance(answer, RouterUnavailable):
                self.losses += self._heard and answer.request_id is None
            if isinstance(answer, RouterUnavailable) or (self._check and unheard):
                self._failed(router, now)
            elif not unheard:
                self._answered(router, now)
            if isinstance(answer, Overloaded):
                router.full_until = now + answer.retry_after

    def can_move(self) -> bool:
        """Whether there is a router that has not failed, and that the call has not tried, after one that it has."""
        if self._only is not None or not self.tried:
            return False
        with self._balance._lock:
            return any(r.failed is None and r.target not in self.tried for r in self._balance._routers.values())

    def _chosen(self, now: float) -> _Router:
        if self._only is None:
            return self._balance._best(now, self.tried, self._stay)
        return self._balance._routers.get(self._only) or _Router(self._only)

    def _failed(self, router: _Router, now: float) -> None:
        if router.failed is not None and self._turn <= router.failed:
            return  # this attempt began before the failure that is known
        router.failures += 1
        router.failed, router.heard, router.owes_since = self._balance._turn, False, None
        router.check_at = now + min(LONGEST_CHECK_SECONDS, FIRST_CHECK_SECONDS * 2.0 ** min(router.failures - 1, 60))

    def _answered(self, router: _Router, now: float) -> None:
        router.owes_since = now if router.in_flight else None
        if router.failed is None or self._turn > router.failed:
            router.failed, router.heard = None, True
            router.check_at = 0.0
            if not self._check:
                router.failures = 0

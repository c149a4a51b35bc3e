"""Watches the routers of a client while it calls: checks those that failed or are silent, and looks names up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..retry import Attempt, Beside, Cut, Flow, Pause, Work
from .balance import Balance, Target

LOOK_SECONDS = 0.25
CHECK_SECONDS = 2.0
"""How long a router may take to answer a check, which asks for its health and computes nothing."""

LOOK_UP_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Keeps the routers of a client in view; `check` is the attempt to ask one for its health.

    `look_up` finds the routers behind their names again, when a watch begins and every 10 seconds; it may wait. None if
    no router is known by a name that others may share.
    """

    routers: Balance
    clock: Callable[[], float]
    check: Callable[[Target], Attempt]
    look_up: Callable[[], list[Target]] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there is more than one router, or may be."""
        return self.look_up is not None or len(self.routers) > 1

    def run(self) -> Flow[None]:
        """Watch until no call has been made for a while; the next one begins another watch."""
        look_up_at = 0.0
        try:
            while self.routers.go_on_watching():
                yield Pause(LOOK_SECONDS)
                for target in self.routers.due():
                    yield Beside(self._check(target))
                if self.look_up is not None and self.clock() >= look_up_at:
                    look_up_at = self.clock() + LOOK_UP_SECONDS
                    yield Beside(self._look_up())
        except BaseException:
            self.routers.end_watch()
            raise

    def _check(self, target: Target) -> Flow[None]:
        """Ask a router for its health. Whatever it answers, it is not frozen; if it does not, its calls move on."""
        yield self.check(target)
        if self.routers.is_lost(target):
            yield Cut(target)

    def _look_up(self) -> Flow[None]:
        gone: list[Target] = []

        def action() -> bytes:
            if self.look_up is not None:
                gone.extend(self.routers.replace(self.look_up()))
            return b""

        yield Work(action)
        for target in gone:
            yield Cut(target)

"""Whether a router may answer at all: not while the cluster may have gone on without it.

A router that its controller has given up must not answer with what was replaced meanwhile. It notices that its process
did not run for a while (frozen, or the machine was suspended), or is told so by a replica that serves it no longer.
From then on it has another session, and refuses every request until the controller has brought this session up to date.
A controller that is gone or frozen is no reason: nobody gives the router up then, and it serves the epoch that it has.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from ...experts.errors import RouterUnavailable

TICK_SECONDS = 1.0
PAUSE_SECONDS = 5.0
"""A longer pause costs a router its standing; a controller waits twice as long before it gives a router up."""


def elapsed() -> float:
    """Seconds, also those in which the machine was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Standing:
    """The session of a router, and whether the controller knows it. Belongs to the router's thread.

    `lost` is called when a session ends. Nobody knows the first one either. Where there is no controller, nothing is
    asked of it: `required` says whether there is one.
    """

    required = False

    def __init__(
        self,
        lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = elapsed,
        name: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.session = name()
        self.problem = "has just started"
        self.lost = lost
        self._clock = clock
        self._name = name
        self._ran: float | None = None

    def tick(self) -> None:
        """Say that the process runs; to be called every `TICK_SECONDS`, and without it no pause is noticed."""
        self._look()
        self._ran = self._clock()

    def check(self) -> None:
        """Raise RouterUnavailable where nothing may be answered."""
        self._look()
        if self.problem and self.required:
            raise RouterUnavailable(
                f"this router {self.problem}; it answers again once the controller has told it of now"
            )

    def lose(self, session: str) -> None:
        """This session was given up: it ends, also one that was never confirmed. An earlier one has ended already."""
        if session == self.session:
            self._end("was given up by its controller")

    @property
    def kept(self) -> bool:
        """Whether requests may be answered, as far as was noticed."""
        return not (self.problem and self.required)

    def confirmed(self, session: str) -> None:
        """The controller has told of now, and knew that this was the session: a message on its way was older."""
        if session == self.session:
            self.problem = ""

    def _look(self) -> None:
        now = self._clock()
        if self._ran is not None and now - self._ran > PAUSE_SECONDS:
            pause, self._ran = now - self._ran, now
            if not self.problem:
                self._end(f"was frozen for {pause:.0f} s")

    def _end(self, problem: str) -> None:
        self.problem, self.session = problem, self._name()
        self.lost()

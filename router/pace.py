"""When the next batch of a layer begins: at once while few are under way, else later and larger. A pure decision.

While `AT_ONCE` batches are under way, the next would only wait behind them; so requests gather until one of them ends,
or for a share of the time that batches take lately, so that one slow expert cannot hold up those who do not need it.
"""

from __future__ import annotations

AT_ONCE = 2
LONGEST_WAIT = 0.005
SHARE = 0.25
SMOOTHING = 0.2


class Pace:
    """Counts the batches of a layer that are under way, and remembers how long they take."""

    def __init__(self) -> None:
        self.under_way = 0
        self.seconds = 0.0

    def begun(self) -> None:
        """A batch was sent."""
        self.under_way += 1

    def ended(self, seconds: float) -> None:
        """A batch has all its answers, after so many seconds."""
        self.under_way -= 1
        self.seconds += SMOOTHING * (seconds - self.seconds)

    def wait(self) -> float:
        """How long the next batch may gather requests, in seconds: 0 when there is room for it."""
        return 0.0 if self.under_way < AT_ONCE else min(LONGEST_WAIT, SHARE * self.seconds)

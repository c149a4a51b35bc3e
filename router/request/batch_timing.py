"""When the next batch of a layer begins: at once, or later and larger. A pure decision.

One batch is on its way at a time, or a second that is as large as the last that began: while replicas compute the one,
requests gather for the other. More would only wait behind them, and small ones cost as much as large ones. A batch
gathers for as long as batches take lately, `LONGEST_WAIT` at most, so that a slow expert cannot hold up those who do
not need it; and after that wait the next ones are measured by the small batch, not by the large one that hangs.
"""

from __future__ import annotations

AT_ONCE = 2
LONGEST_WAIT = 0.005
SMOOTHING = 0.2


class BatchTiming:
    """Counts the batches of a layer under way, and remembers how large the last one was and how long they take."""

    def __init__(self) -> None:
        self.under_way = 0
        self.rows = 0
        self.seconds = 0.0

    def begun(self, rows: int) -> None:
        """A batch of so many rows was sent."""
        self.under_way += 1
        self.rows = rows

    def ended(self, seconds: float) -> None:
        """A batch has all its answers, after so many seconds."""
        self.under_way -= 1
        self.seconds += SMOOTHING * (seconds - self.seconds)

    def wait(self, rows: int) -> float:
        """How long the next batch may gather more than the `rows` that it has, in seconds: 0 when it may begin."""
        if self.under_way == 0 or (self.under_way < AT_ONCE and rows >= self.rows):
            return 0.0
        return min(LONGEST_WAIT, self.seconds)

"""When the next batch of a layer starts: now, or later and larger. Pure logic, no I/O.

A batch starts at once if none is in flight. A second one starts as soon as it is as large as the last batch: requests
gather for it while replicas compute the first. More batches would only queue behind these, and a small batch costs as
much as a large one. Requests gather for as long as recent batches took, `LONGEST_WAIT` at most, so that a slow expert
does not delay requests that do not need it. After such a wait, the next batches must reach the size of the small batch
that started, not that of the large one that hangs.
"""

from __future__ import annotations

TARGET_IN_FLIGHT = 2
"""With this many batches of a layer in flight, the next one waits."""

LONGEST_WAIT = 0.005
SMOOTHING = 0.2


class BatchTiming:
    """Tracks the batches of a layer: how many are in flight, the rows of the last one, the seconds of recent ones."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.rows = 0
        self.seconds = 0.0

    def started(self, rows: int) -> None:
        """Record that a batch with this many rows was sent."""
        self.in_flight += 1
        self.rows = rows

    def ended(self, seconds: float) -> None:
        """Record that a batch has all its answers, this many seconds after its start."""
        self.in_flight -= 1
        self.seconds += SMOOTHING * (seconds - self.seconds)

    def wait(self, rows: int) -> float:
        """How many seconds the next batch, with `rows` so far, may gather more; 0 if it may start now."""
        if self.in_flight == 0 or (self.in_flight < TARGET_IN_FLIGHT and rows >= self.rows):
            return 0.0
        return min(LONGEST_WAIT, self.seconds)

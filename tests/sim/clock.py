"""Virtual time: a heap of events, and one source of chance. Nothing waits, and the same seed gives the same run."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any


class Clock:
    """Runs events in the order of their time; equal times in the order in which they were made.

    What is put into `failure` ends the run after the event that put it there, whoever has caught it in the meantime.
    """

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.events = 0
        self.failure: AssertionError | None = None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._made = 0

    def after(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call `action` when `delay` seconds have passed."""
        self._made += 1
        heapq.heappush(self._heap, (self.now + delay, self._made, action, arguments))

    def run(self, until: float) -> None:
        """Let time pass up to `until`. Raises the failure that an event has left."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(self._heap)
            self.events += 1
            action(*arguments)
            if self.failure is not None:
                raise self.failure
        self.now = until

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return share > 0.0 and self.rng.random() < share

    def between(self, low: float, high: float) -> float:
        """A moment in between."""
        return low + (high - low) * self.rng.random()

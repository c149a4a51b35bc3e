"""When a message to a replica is late, so that its work is sent to another one as well. Pure logic, no I/O."""

from __future__ import annotations

from collections import deque

FLOOR_SECONDS = 0.1
COLD_SECONDS = 1.0
FACTOR = 3.0
KEPT, KNOWN = 200, 20
BURST, SHARE = 16.0, 0.05


class Pace:
    """How long messages to the replicas of the same experts took lately, and from when on one is late."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=KEPT)

    def took(self, seconds: float, rows: int) -> None:
        """Take the time from sending a message to its answer; `rows` includes those that were in flight before it."""
        self._recent.append((seconds, rows))

    def is_late(self, seconds: float, rows: int, timeout: float) -> bool:
        """Whether a message of `rows` that has been in flight for `seconds` is late; `timeout` is what it was given."""
        return seconds > FLOOR_SECONDS and seconds > self.bound(rows, timeout)

    def bound(self, rows: int, timeout: float) -> float:
        """Three times the 99th percentile of the recent messages, in seconds; more for more rows than any of them had.

        It is less where the deadline would leave another replica no time to answer, but never less than the slowest
        of the recent messages took. While few are known, it is at least a second, or half of the timeout.
        """
        times = sorted(seconds for seconds, _ in self._recent)
        scale = max(1.0, rows / max((known for _, known in self._recent if known), default=rows or 1))
        slowest = times[-1 - len(times) // 100] * scale if times else 0.0
        usual = FACTOR * slowest
        if len(times) < KNOWN:
            usual = max(usual, COLD_SECONDS)
        return max(FLOOR_SECONDS, slowest, min(usual, timeout - 2 * slowest, timeout / 2))


class HedgeBudget:
    """Bounds the share of messages that are sent twice, so that what is slow under load is not made slower."""

    def __init__(self) -> None:
        self._left = BURST

    def sent(self) -> None:
        """Count one message."""
        self._left = min(BURST, self._left + SHARE)

    def take(self) -> bool:
        """Whether one more replica may be found late; counts it if so."""
        if self._left < 1:
            return False
        self._left -= 1
        return True

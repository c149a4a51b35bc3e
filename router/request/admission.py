"""Admission: limits the rows in flight, and refuses calls that would wait too long; both reject early."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...experts.errors import Overloaded, TooLarge


class Admission:
    """Counts the rows of admitted requests.

    `max_rows` limits all layers together. One layer may use at most three quarters of it, so that a slow layer cannot
    starve the others; this costs a cluster with a single layer little.
    """

    LAYER_SHARE = 0.75

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows = 0
        self._by_layer: dict[str, int] = {}

    @contextmanager
    def admit(self, layer: str, rows: int) -> Iterator[None]:
        """Hold `rows` for a request of `layer`; a request without rows counts as one row. Raises as `check` does."""
        rows = max(1, rows)
        self.check(layer, rows)
        self._by_layer[layer] = self._by_layer.get(layer, 0) + rows
        self.rows += rows
        try:
            yield
        finally:
            self.rows -= rows
            self._by_layer[layer] -= rows
            if not self._by_layer[layer]:
                del self._by_layer[layer]

    def check(self, layer: str, rows: int) -> None:
        """Raises TooLarge for a request that can never fit, Overloaded for one that does not fit now."""
        layer_limit = max(1, int(self.max_rows * self.LAYER_SHARE))
        held = self._by_layer.get(layer, 0)
        if rows > layer_limit:
            raise TooLarge(
                f"the request has {rows} rows, but max_rows_in_flight leaves room for {layer_limit} per layer: split it"
            )
        if held + rows > layer_limit or self.rows + rows > self.max_rows:
            raise Overloaded(f"too many rows in flight: {held} in layer {layer}, {self.rows} in all; retry later")

    def by_layer(self) -> dict[str, int]:
        """The rows in flight of each layer that has any."""
        return dict(self._by_layer)


@dataclass
class _Pace:
    """What recent calls of a layer say: with `ahead` in flight they took `seconds`, the quickest of them `base`."""

    in_flight: int = 0
    seconds: float = 0.0
    ahead: float = 0.0
    base: float = math.inf
    ended: float = 0.0
    gap: float = 0.0
    _busy: float = 0.0
    _answers: int = 0
    _counting: bool = False

    def wait(self) -> float:
        """The seconds that another call would wait for those in flight.

        What calls took beyond `base` grows with those in flight; and while calls wait, `gap` is the time between the
        ends of two. Neither alone: a burst makes the first calls of it slow, and a layer with little to do has gaps.
        """
        if not self.gap:
            return 0.0
        return self.in_flight * min(self.gap, max(0.0, self.seconds - self.base) / self.ahead)

    def learn(self, seconds: float, ahead: int, now: float) -> None:
        """Take a call that took `seconds`, with `ahead` in flight when it began, itself included."""
        growth = BASE_GROWTH * (now - self.ended) / max(1.0, 20.0 * self.seconds)
        self.base = min(seconds, self.base * (1.0 + growth))
        self.seconds += SMOOTHING * (seconds - self.seconds) if self.ahead else seconds
        self.ahead += SMOOTHING * (ahead - self.ahead) if self.ahead else ahead
        if self._counting:
            self._busy += now - self.ended
            self._answers += 1
        self._counting = self.in_flight > 1  # from an end to the next one, as long as a call waits or is computed
        if self._busy >= GAP_SECONDS:
            self.gap, self._busy, self._answers = self._busy / self._answers, 0.0, 0
        self.ended = now


ALWAYS = 16
"""While fewer calls of a layer are in flight, none is refused: so a layer that had been slow shows that it is not."""

DEADLINE_SHARE = 0.5
"""A call may be expected to wait for this share of its remaining time; the rest is for the call itself."""

SMOOTHING = 0.1
BASE_GROWTH = 0.05
"""How fast the quickest call is forgotten, per second, or where calls are slow per twenty of them."""

GAP_SECONDS = 0.1
"""The time over which the ends of calls are counted; before, nothing is known and nothing refused."""

MAX_CALLS = 32_768
"""Calls of all layers in flight."""


class CallAdmission:
    """Refuses calls that would wait too long for the others of their layer.

    A call that found n others in flight took t seconds: where it had to wait for them, t grows with n; where all are
    computed at once, t stays what it is for one. Both are seen in the calls that end, so neither a slow expert nor a
    burst is taken for an overload. All times are in seconds of any monotonic clock.
    """

    def __init__(self) -> None:
        self._paces: defaultdict[str, _Pace] = defaultdict(_Pace)
        self.calls = 0

    def only_layer(self) -> str:
        """The layer of all calls in flight, or "" if they are of several."""
        busy = [layer for layer, pace in self._paces.items() if pace.in_flight]
        return busy[0] if len(busy) == 1 else ""

    def check(self, layer: str, remaining: float) -> None:
        """Raises Overloaded if a call of a layer would probably wait too long for its `remaining` seconds."""
        if self.calls >= MAX_CALLS:
            raise Overloaded(f"{self.calls} calls are in flight already; retry later", retry_after=1.0)
        pace = self._paces.get(layer)
        if pace is None or pace.in_flight < ALWAYS:
            return
        excess = (wait := pace.wait()) - DEADLINE_SHARE * remaining
        if excess > 0:
            raise Overloaded(
                f"{pace.in_flight} calls of layer {layer} are in flight, and another one would wait about "
                f"{wait:.2g} s of its {remaining:.2g} s; retry later, or with a longer timeout",
                retry_after=min(max(excess, 0.05), 5.0),
            )

    def began(self, layer: str) -> int:
        """Count a call; returns how many others of its layer are in flight."""
        pace = self._paces[layer]
        pace.in_flight += 1
        self.calls += 1
        return pace.in_flight - 1

    def ended(self, layer: str, ahead: int, seconds: float | None, now: float) -> None:
        """Count a call that found `ahead` others as over; `seconds` is how long it took, None if that says nothing."""
        pace = self._paces[layer]
        if seconds is not None:
            pace.learn(seconds, ahead + 1, now)
        pace.in_flight -= 1
        self.calls -= 1

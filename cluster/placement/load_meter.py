"""The load of each group of replicas, from what routers count."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...router.fanout.telemetry import ReplicaLoad

SMOOTHING_SECONDS = 5.0
"""How slowly the number of busy replicas follows what is measured."""


@dataclass
class _Group:
    """What was counted since the last measure, what waits, and how many replicas compute on average."""

    rows: int = 0
    waited: float = 0.0
    computing: float = 0.0
    waiting: dict[tuple[str, str], int] = field(default_factory=dict)
    busy: float = 0.0


class LoadMeter:
    """Measures all routers together; a group is what the replicas "news/e3#0", "news/e3#1" ... are of.

    The wait of a group is that of a row, in the router and in the replica, before it is computed: what all rows have
    waited since the last measure, by the rows that were sent meanwhile. While nothing is sent, rows that wait have
    waited at least since then.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, Mapping[str, ReplicaLoad]]] = {}
        self._groups: defaultdict[str, _Group] = defaultdict(_Group)
        self._at: float | None = None

    def reported(self, router: str, incarnation: str, loads: Mapping[str, ReplicaLoad]) -> None:
        """Take what an incarnation of a router has counted since its start, by replica; the first report is ignored."""
        known, last = self._last.get(router, ("", {}))
        self._last[router] = incarnation, loads
        for replica, load in loads.items() if known == incarnation else ():
            group, before = self._groups[replica.rpartition("#")[0]], last.get(replica, load)
            group.rows += load.rows - before.rows
            group.waited += max(0.0, load.waited - before.waited)  # less, where rows that waited were dropped
            group.computing += load.computing - before.computing
            group.waiting[router, replica] = load.waiting

    def left(self, router: str) -> None:
        """Forget a router that has left; what it has counted stays."""
        self._last.pop(router, None)

    def measure(self, now: float, groups: Iterable[str]) -> dict[str, tuple[float, float]]:
        """For each group, how many milliseconds a row waits, and how many replicas compute, at a time in seconds."""
        elapsed = 0.0 if self._at is None else now - self._at
        self._at = now
        known, self._groups = self._groups, defaultdict(_Group)
        measured, share = {}, 1 - math.exp(-elapsed / SMOOTHING_SECONDS)
        for name in groups:
            group = self._groups[name] = known[name]
            rows = group.rows or sum(group.waiting.values())
            group.busy += share * ((group.computing / elapsed if elapsed else 0.0) - group.busy)
            group.computing = 0.0
            measured[name] = (1000 * group.waited / rows if rows else 0.0, group.busy)
            if group.rows or not rows:
                group.rows, group.waited = 0, 0.0
            group.waiting = {}  # a router or replica that is gone does not report again
        return measured

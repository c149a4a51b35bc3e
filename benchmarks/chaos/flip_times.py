"""When the router flipped to each epoch, and which requests were under way just then."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from expertmesh.cluster.runfile import home

from .load import Seen

ROUTER = {"RouterActor": "benchmarks.chaos.flips:NotingRouterActor"}


def flip_file() -> Path:
    """Where the router writes epochs and times."""
    return home() / "flips"


def flip_times(epochs: Collection[int]) -> list[float]:
    """When each of these epochs was adopted first, in monotonic seconds."""
    times: dict[int, float] = {}
    for line in flip_file().read_text().splitlines():
        number, _, moment = line.partition(" ")
        times.setdefault(int(number), float(moment))
    return sorted(times[number] for number in epochs)


def overlapped(seen: Iterable[Seen], flips: Iterable[float]) -> int:
    """How many answered requests had been sent before a flip, and were answered after it."""
    moments = list(flips)
    return sum(any(one.sent < flip < one.done for flip in moments) for one in seen if not one.error)

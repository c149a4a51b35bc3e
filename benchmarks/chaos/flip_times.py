"""When an epoch was committed and when the router flipped to it, and which requests were under way just then."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from expertmesh.cluster.machine.run_files import home

from .load import SeenEpoch

ROUTER = {"RouterActor": "benchmarks.chaos.flips:NotingRouterActor"}
CONTROLLER = {"ControllerActor": "benchmarks.chaos.commits:NotingControllerActor"}


def flip_file() -> Path:
    """Where the router writes epochs and times."""
    return home() / "flips"


def commit_file() -> Path:
    """Where the controller writes epochs and times."""
    return home() / "commits"


def flip_times(epochs: Collection[int]) -> list[float]:
    """When each of these epochs was adopted first, in monotonic seconds."""
    times = moments(flip_file())
    return sorted(times[number] for number in epochs)


def flip_delays(epochs: Collection[int]) -> list[float]:
    """Seconds from the commit of each of these epochs to its flip."""
    committed, flipped = moments(commit_file()), moments(flip_file())
    return [flipped[number] - committed[number] for number in epochs]


def moments(file: Path) -> dict[int, float]:
    """{epoch: the first time that was written for it}, in monotonic seconds."""
    times: dict[int, float] = {}
    for line in file.read_text().splitlines():
        number, _, moment = line.partition(" ")
        times.setdefault(int(number), float(moment))
    return times


def overlapped(seen: Iterable[SeenEpoch], flips: Iterable[float]) -> int:
    """How many answered requests had been sent before a flip, and were answered after it."""
    moments = list(flips)
    return sum(any(one.sent < flip < one.done for flip in moments) for one in seen if not one.error)

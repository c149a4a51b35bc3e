"""What this process and all below it cost in CPU time, and how much of the machine others used meanwhile."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Cost:
    """CPU seconds of our processes over a span of `seconds`; `foreign` is the share of the machine that others used."""

    seconds: float
    cpu_seconds: float
    foreign: float


class Meter:
    """Counts from its making on."""

    def __init__(self) -> None:
        self._ours = tree_seconds()
        self._machine = machine_seconds()
        self._begin = time.perf_counter()

    def cost(self) -> Cost:
        """What was used up to now."""
        seconds = time.perf_counter() - self._begin
        machine = machine_seconds() - self._machine
        now = tree_seconds()
        ours = sum(used - self._ours.get(process, 0.0) for process, used in now.items())
        foreign = max(0.0, machine - ours) / (seconds * (os.cpu_count() or 1))
        return Cost(seconds, ours, foreign)


def tree_seconds() -> dict[tuple[int, float], float]:
    """CPU seconds of this process and everything below it, by process id and time of birth."""
    me = psutil.Process()
    found = {}
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
            found[(process.pid, process.create_time())] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def machine_seconds() -> float:
    """CPU seconds that the machine has spent on anything; what its host took away counts too."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)

"""Latency, throughput and CPU time of an arm in a block, which is run again where others kept the machine busy."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from torch import Tensor

from .arm import Arm

MOST_FOREIGN = 0.05
TRIES = 4


@dataclass(frozen=True)
class Block:
    """One block: rows a second, seconds of each call, CPU seconds of all our processes for 1,000 rows.

    `foreign` is the share of the machine that other processes used; `tries` is how often the block was run until
    that was little, or given up; blocks of one `round` lie close together in time.
    """

    rows_per_second: float
    latencies: tuple[float, ...]
    cpu_seconds: float
    foreign: float
    tries: int = 1
    round: int = 0

    @property
    def p50(self) -> float:
        """The median latency in seconds."""
        return statistics.median(self.latencies)


async def block(arm: Arm, x_TD: Tensor, in_flight: int, seconds: float) -> Block:
    """A block under load, run again while others use much of the machine, a few times at most."""
    for attempt in range(1, TRIES + 1):
        meter = Meter()
        rate, latencies = await _drive(arm, x_TD, in_flight, seconds)
        cost = meter.cost()
        rows = len(latencies) * x_TD.shape[0]
        found = Block(rate, tuple(latencies), 1000 * cost.cpu_seconds / rows, cost.foreign, attempt)
        if found.foreign <= MOST_FOREIGN:
            break
    return found


async def _drive(arm: Arm, x_TD: Tensor, in_flight: int, seconds: float) -> tuple[float, list[float]]:
    """Rows a second, and the seconds of each call."""
    latencies: list[float] = []
    ends: list[float] = []
    deadline = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < deadline or len(ends) < 2 * in_flight:
            begin = time.perf_counter()
            await arm.call(x_TD)
            ends.append(time.perf_counter())
            latencies.append(ends[-1] - begin)

    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return x_TD.shape[0] * calls_per_second(ends, in_flight, deadline), latencies


def calls_per_second(ends: Sequence[float], in_flight: int, deadline: float) -> float:
    """The rate of calls that ended at these times, ascending: at least twice as many as are in flight.

    Counted is from the end of the first `in_flight` calls to the end of the last whole group of `in_flight`: the calls
    of an arm often end together, and neither the ramp nor part of a group must distort the rate.
    """
    full = [end for end in ends if end <= deadline]
    if len(full) < 2 * in_flight:
        full = list(ends)
    whole = len(full) - len(full) % in_flight
    return (whole - in_flight) / (full[whole - 1] - full[in_flight - 1])


@dataclass(frozen=True)
class Cost:
    """CPU seconds of this process and all below it; `foreign` is the share of the machine that others used."""

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
        return Cost(ours, foreign)


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

"""`chaos-kill`: replicas and the controller are killed with SIGKILL under load and in the middle of swaps."""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

from .figures import between, harm, longest_gap, p99_ms, quantile, rows_per_second, say, say_judged
from .kill_controller import acknowledged_swaps, cold_restart, crash_points
from .load import LOAD_SHARE, Load
from .mesh import Mesh

LOSS_SECONDS = 0.4
"""In which the loss of a replica shows; after that its successor starts, and takes the cores to import torch."""

PARTS = ("replicas", "steps", "commits", "restart")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--seconds", type=float, default=60.0, help="for which replicas are killed")
    parser.add_argument("--steady", type=float, default=15.0, help="seconds before the first kill")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from one kill of a replica to the next")
    parser.add_argument("--kills", type=int, default=25, help="of the controller while it commits")
    parser.add_argument("--share", type=float, default=LOAD_SHARE, help="of the capacity, under which replicas die")
    parser.add_argument("--count", type=int, default=4, help="rows of a request")
    parser.add_argument("--only", nargs="*", choices=PARTS)


def cluster(options: argparse.Namespace) -> dict[str, Any]:
    """A controller that dies at a step when it is told to."""
    return {"actors": {"ControllerActor": "benchmarks.chaos.actors:CrashingControllerActor"}}


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """Every part that is wanted, and what was not as it must be."""
    wanted, problems = options.only or PARTS, []
    rate = mesh.rate(options.share, count=options.count, seconds=4.0)
    if "replicas" in wanted:
        problems += replicas(mesh, rate, options)
    if "steps" in wanted:
        problems += crash_points(mesh, rate, options.count)
    if "commits" in wanted:
        problems += acknowledged_swaps(mesh, options.kills)
    if "restart" in wanted:
        problems += cold_restart(mesh, options.count)
    return problems


@dataclass
class Killer:
    """Kills a replica whenever one is due and some expert has all of its replicas ready; watches them come back."""

    mesh: Mesh
    replicas: int
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    away: dict[str, float] = field(default_factory=dict)
    back: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def run(self, seconds: float, every: float) -> None:
        """Kill for so many seconds, then wait until all are back."""
        begin = time.monotonic()
        due = begin
        while time.monotonic() - begin < seconds or (self.away and time.monotonic() - begin < seconds + 60):
            ready = self._look()
            whole = [id for id, pids in ready.items() if len(pids) == self.replicas and id not in self.away]
            now = time.monotonic()
            if now >= due and now - begin < seconds and whole:
                id = self.draw.choice(whole)
                os.kill(self.draw.choice(ready[id]), signal.SIGKILL)
                self.away[id] = time.monotonic()
                self.times.append(self.away[id])
                due += every
            time.sleep(0.1)

    def _look(self) -> dict[str, list[int]]:
        ready = {id: [pid for pid in pids if psutil.pid_exists(pid)] for id, pids in self.mesh.pids().items()}
        for id, since in list(self.away.items()):
            if len(ready[id]) == self.replicas:
                self.back.append(time.monotonic() - since)
                del self.away[id]
        return ready


def killed(
    mesh: Mesh, load: Load, replicas: int, *, steady: float, seconds: float, every: float
) -> tuple[Killer, float]:
    """Kill replicas under a load that was steady before; returns who did, and when it began."""
    killer = Killer(mesh, replicas)
    with load:
        time.sleep(steady)
        begin = time.monotonic()
        killer.run(seconds, every)
    return killer, begin


def replicas(mesh: Mesh, rate: float, options: argparse.Namespace) -> list[str]:
    """SIGKILL of a replica every few seconds while its sibling is ready."""
    load = mesh.load(rate=rate, count=options.count)
    times = {"steady": options.steady, "seconds": options.seconds, "every": options.every}
    killer, begin = killed(mesh, load, options.replicas, **times)
    found = say_judged(mesh.checker(), load)
    say("replicas killed", len(killer.times), f"one in {options.every:g} s")
    back = f"{quantile(killer.back, 0.5):.1f} / {max(killer.back, default=float('nan')):.1f}"
    say("seconds until it is ready again, p50 / most", back, "<= 10")
    after = [1000 * longest_gap(load.seen, time, time + LOSS_SECONDS) for time in killer.times]
    say("longest gap just after a kill, ms, of all / median", f"{max(after):.0f} / {median(after):.0f}", "<= 100")
    end = begin + options.seconds
    spans: list[tuple[float, float]] = [(begin - options.steady, begin), (begin, end)]
    gaps = [1000 * longest_gap(load.seen, *span) for span in spans]
    say("longest gap between answers, ms, steady / with kills", f"{gaps[0]:.0f} / {gaps[1]:.0f}", "<= 100")
    p99 = [p99_ms(between(load.seen, *span)) for span in spans]
    say("latency p99 ms, steady / with kills", f"{p99[0]:.1f} / {p99[1]:.1f}")
    say("p99 ratio", p99[1] / p99[0], "<= 3")
    rates = [rows_per_second(load.seen, *span, options.count) for span in spans]
    say("rows/s, steady / with kills", f"{rates[0]:.0f} / {rates[1]:.0f}", ">= 90 %")
    problems = [f"{harm(found)} requests failed or were wrong while replicas were killed"] if harm(found) else []
    if killer.away or len(killer.times) < 0.8 * options.seconds / options.every:
        problems.append(f"{len(killer.times)} replicas were killed, {len(killer.away)} did not come back")
    return problems

"""`chaos-kill`: replicas and the controller are killed with SIGKILL under load and in the middle of swaps."""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from dataclasses import dataclass, field
from statistics import median

from .checker import Checker
from .figures import (
    between,
    harm,
    judged,
    longest_gap,
    p99_ms,
    quantile,
    rows_per_second,
    say,
    say_judged,
    say_load,
)
from .kill_controller import acknowledged_swaps, cold_restart, crash_points
from .load import Load, capacity
from .mesh import Mesh, chaos_mesh

LOAD_SHARE = 0.6
LOSS_SECONDS = 0.4
"""In which the loss of a replica shows; after that its successor starts, and takes the cores to import torch."""

CRASHING = {"ControllerActor": "benchmarks.chaos.crash:CrashingControllerActor"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="for which replicas are killed")
    parser.add_argument("--steady", type=float, default=15.0, help="seconds before the first kill")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from one kill of a replica to the next")
    parser.add_argument("--kills", type=int, default=25, help="of the controller while it commits")
    parser.add_argument("--share", type=float, default=LOAD_SHARE, help="of the capacity, under which replicas die")
    parser.add_argument("--count", type=int, default=4, help="rows of a request")
    parser.add_argument("--only", nargs="*", choices=("replicas", "steps", "commits", "restart"))


def main(options: argparse.Namespace) -> int:
    """Run it; 0 when all is as it must be."""
    wanted = options.only or ("replicas", "steps", "commits", "restart")
    problems: list[str] = []
    with chaos_mesh(
        "chaos-kill", experts=options.experts, replicas=options.replicas, actors=CRASHING, transport=options.transport
    ) as mesh:
        full = capacity(mesh.cluster.endpoint, mesh.shape.layer, count=options.count, seconds=4.0)
        say("capacity, rows/s (32 callers)", full)
        rate = options.share * full / options.count
        if "replicas" in wanted:
            problems += replicas(mesh, rate, options)
        if "steps" in wanted:
            problems += crash_points(mesh, rate, options.count)
        if "commits" in wanted:
            problems += acknowledged_swaps(mesh, options.kills)
        if "restart" in wanted:
            problems += cold_restart(mesh, options.count)
        say("rows to replicas", mesh.carried())
        say_load()
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


@dataclass
class Killer:
    """Kills a replica whenever one is due and some expert has all of its replicas ready; watches them come back."""

    mesh: Mesh
    replicas: int
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    away: dict[str, float] = field(default_factory=dict)
    back: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many were killed."""
        return len(self.times)

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
        ready = {id: [pid for pid in pids if _lives(pid)] for id, pids in self.mesh.pids().items()}
        for id, since in list(self.away.items()):
            if len(ready[id]) == self.replicas:
                self.back.append(time.monotonic() - since)
                del self.away[id]
        return ready


def replicas(mesh: Mesh, rate: float, options: argparse.Namespace) -> list[str]:
    """SIGKILL of a replica every few seconds while its sibling is ready."""
    say("open-loop load, requests/s", rate)
    load = Load(mesh.cluster.endpoint, mesh.shape.layer, rate=rate, count=options.count).start()
    killer = Killer(mesh, options.replicas)
    try:
        time.sleep(options.steady)
        begin = time.monotonic()
        killer.run(options.seconds, options.every)
    finally:
        load.stop()
    checker = Checker(mesh.shape, mesh.ledger)
    found, end = judged(checker, load), begin + options.seconds
    say_judged(found, checker, load)
    say("replicas killed", killer.kills, f"one in {options.every:g} s")
    say("seconds until it is ready again, p50 / most", _seconds(killer.back), "<= 10")
    after = [1000 * longest_gap(load.seen, time, time + LOSS_SECONDS) for time in killer.times]
    say("longest gap just after a kill, ms, of all / median", f"{max(after):.0f} / {median(after):.0f}", "<= 100")
    gaps = [longest_gap(load.seen, start, stop) for start, stop in ((begin - options.steady, begin), (begin, end))]
    say(
        "longest gap between answers, ms, steady / with kills", f"{1000 * gaps[0]:.0f} / {1000 * gaps[1]:.0f}", "<= 100"
    )
    steady, during = between(load.seen, begin - options.steady, begin), between(load.seen, begin, end)
    say("latency p99 ms, steady / with kills", f"{p99_ms(steady):.1f} / {p99_ms(during):.1f}")
    say("p99 ratio", p99_ms(during) / p99_ms(steady), "<= 3")
    rates = [rows_per_second(load.seen, begin - options.steady, begin, options.count)]
    rates.append(rows_per_second(load.seen, begin, end, options.count))
    say("rows/s, steady / with kills", f"{rates[0]:.0f} / {rates[1]:.0f}", ">= 90 %")
    problems = [f"{harm(found)} requests failed or were wrong while replicas were killed"] if harm(found) else []
    if killer.away or killer.kills < 0.8 * options.seconds / options.every:
        problems.append(f"{killer.kills} replicas were killed, {len(killer.away)} did not come back")
    return problems


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _seconds(values: list[float]) -> str:
    return f"{quantile(values, 0.5):.1f} / {max(values, default=float('nan')):.1f}"

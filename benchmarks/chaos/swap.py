"""`chaos-swap`: a hundred swaps in a minute under open-loop load, every answer recomputed; mutants are to be caught."""

from __future__ import annotations

import argparse
import time

from .checker import Checker
from .figures import (
    between,
    harm,
    judged,
    p99_ms,
    quantile,
    rows_per_second,
    say,
    say_judged,
    say_load,
)
from .flip_times import ROUTER, flip_times, overlapped
from .load import Load, capacity
from .mesh import Mesh, chaos_mesh
from .swaps import Swapper, make_swaps, paced

LOAD_SHARE = 0.6
P99_LIMIT = 2.0

EARLY = {"ControllerActor": "benchmarks.chaos.mutants:EarlyController"}
MUTANTS = {"early": EARLY, "newest": {**EARLY, "ExpertActor": "benchmarks.chaos.mutants:NewestExpert"}}
"""Flips before the replicas have staged; the same, with replicas that then answer with another version."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the part with swaps")
    parser.add_argument("--steady", type=float, default=20.0, help="seconds without swaps, half before and half after")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--overlaps", type=int, default=500, help="fewest replies that must overlap a flip")
    parser.add_argument("--count", type=int, default=4, help="rows of a request")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that an expert waits for each message")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break a rule: exit 0 only if that is noticed")


def main(options: argparse.Namespace) -> int:
    """Run it; 0 when all is as it must be."""
    actors = ROUTER | MUTANTS.get(options.mutant, {})
    with chaos_mesh(
        "chaos-swap",
        experts=options.experts,
        replicas=options.replicas,
        pause=options.pause,
        actors=actors,
        transport=options.transport,
    ) as mesh:
        problems = run(mesh, options)
    if options.mutant:
        print(f"mutant {options.mutant}: {'caught: ' + ', '.join(problems) if problems else 'NOT CAUGHT'}")
        return 0 if problems else 1
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """Load, swaps, and what was wrong."""
    swaps = make_swaps(mesh.files, options.swaps)
    full = capacity(mesh.cluster.endpoint, mesh.shape.layer, count=options.count, seconds=min(5.0, options.seconds))
    say("capacity, rows/s (32 callers)", full)
    say_load()
    rate = LOAD_SHARE * full / options.count
    say("open-loop load, requests/s", rate)
    load = Load(mesh.cluster.endpoint, mesh.shape.layer, rate=rate, count=options.count).start()
    swapper = Swapper(mesh)
    times = [time.monotonic()]
    try:
        time.sleep(options.steady / 2)
        times.append(time.monotonic())
        paced(swapper, swaps, options.seconds)
        times.append(time.monotonic())
        time.sleep(options.steady / 2)
        times.append(time.monotonic())
    finally:
        load.stop()
    return report(mesh, load, swapper, times, options)


def report(mesh: Mesh, load: Load, swapper: Swapper, times: list[float], options: argparse.Namespace) -> list[str]:
    """Print what was seen; returns what was not as it must be."""
    checker = Checker(mesh.shape, mesh.ledger)
    found = judged(checker, load)
    overlaps = overlapped(load.seen, flip_times(swapper.epochs))
    sets, with_gate = swapper.count("set", "gate"), swapper.count("gate")
    say_judged(found, checker, load)
    say("rows to replicas", mesh.carried())
    say("replies that overlapped a flip", overlaps, f">= {options.overlaps}")
    say("committed swaps", len(swapper.committed), f"{options.swaps} in {times[2] - times[1]:.1f} s")
    say("  of them sets, with the gate", f"{sets}, {with_gate}")
    say("  asked again while draining", swapper.draining)
    say("swap latency ms, p50 / p99", _pair(swapper.seconds))
    for refusal in swapper.refused[:3]:
        print(f"    swap refused: {refusal}")
    steady = between(load.seen, times[0], times[1]) + between(load.seen, times[2], times[3])
    ratio = _say_latency(load, steady, times)
    say_load()
    problems = [f"{number} {name}" for name, number in found.items() if name not in ("requests", "right") and number]
    if len(swapper.committed) < options.swaps:
        problems.append(f"{len(swapper.committed)} of {options.swaps} swaps were committed in time")
    if overlaps < options.overlaps and not options.mutant:
        problems.append(f"{overlaps} replies overlapped a flip")
    if sets < 0.3 * options.swaps or with_gate < 0.1 * options.swaps:
        problems.append("too few sets, or sets with the gate")
    if options.mutant:
        return problems if harm(found) else []
    if ratio > P99_LIMIT:
        print(f"note: p99 ratio {ratio:.2f} is above {P99_LIMIT:g}, which is the aim on an otherwise idle machine")
    return problems


def _say_latency(load: Load, steady: list, times: list[float]) -> float:  # type: ignore[type-arg]
    during = between(load.seen, times[1], times[2])
    p99 = (p99_ms(steady), p99_ms(during))
    halves = [rows_per_second(load.seen, times[n], times[n + 1], load.count) for n in range(3)]
    quiet = (times[1] - times[0], times[3] - times[2])
    steady_rate = (halves[0] * quiet[0] + halves[2] * quiet[1]) / sum(quiet)
    medians = [1000 * quantile((one.latency for one in part), 0.5) for part in (steady, during)]
    say("latency p50 ms, steady / during swaps", f"{medians[0]:.1f} / {medians[1]:.1f}")
    say("latency p99 ms, steady / during swaps", f"{p99[0]:.1f} / {p99[1]:.1f}")
    say("p99 ratio", p99[1] / p99[0], f"<= {P99_LIMIT:g}, aim 1.1")
    say("rows/s, steady / during swaps", f"{steady_rate:.0f} / {halves[1]:.0f}")
    return p99[1] / p99[0]


def _pair(seconds: list[float]) -> str:
    return f"{1000 * quantile(seconds, 0.5):.0f} / {1000 * quantile(seconds, 0.99):.0f}"

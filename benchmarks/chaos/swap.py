"""`chaos-swap`: a hundred swaps in a minute under open-loop load, every answer recomputed; mutants are to be caught."""

from __future__ import annotations

import argparse
import random
from typing import Any

from .figures import harm, overlapped, p99_ms, quantile, rows_per_second, say, say_judged
from .load import LOAD_SHARE
from .mesh import Mesh
from .signals import flip_times
from .swaps import KINDS, Swapped, make_swap, swapped

P99_LIMIT = 2.0

ROUTER = {"RouterActor": "benchmarks.chaos.actors:NotingRouterActor"}
EARLY = {"ControllerActor": "benchmarks.chaos.actors:EarlyController"}
MUTANTS = {"early": EARLY, "newest": {**EARLY, "ExpertActor": "benchmarks.chaos.actors:NewestExpert"}}
"""Flips before the replicas have staged; the same, with replicas that then answer with another version."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--seconds", type=float, default=60.0, help="of the part with swaps")
    parser.add_argument("--steady", type=float, default=20.0, help="seconds without swaps, half before and half after")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--overlaps", type=int, default=500, help="fewest replies that must overlap a flip")
    parser.add_argument("--count", type=int, default=4, help="rows of a request")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that an expert waits for each message")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break a rule: exit 0 only if that is noticed")


def cluster(options: argparse.Namespace) -> dict[str, Any]:
    """A router that notes its flips, and the mutant's actors."""
    return {"pause": options.pause, "actors": ROUTER | MUTANTS.get(options.mutant, {})}


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """Load, swaps, and what was wrong; of a mutant that it was not caught."""
    draw = random.Random(0)
    swaps = [make_swap(mesh, KINDS[number % len(KINDS)], draw) for number in range(options.swaps)]
    rate = mesh.rate(LOAD_SHARE, count=options.count, seconds=min(5.0, options.seconds))
    load = mesh.load(rate=rate, count=options.count)
    seen = swapped(mesh, swaps, load, quiet=options.steady / 2, seconds=options.seconds)
    found = say_judged(mesh.checker(), load)
    overlaps = overlapped(load.seen, flip_times(seen.swapper.epochs))
    say("replies that overlapped a flip", overlaps, f">= {options.overlaps}")
    problems = [f"{number} {name}" for name, number in found.items() if name not in ("requests", "right") and number]
    problems += seen.swapper.say(options.swaps, seen.times[2] - seen.times[1])
    p50, p99 = (1000 * quantile(seen.swapper.seconds, share) for share in (0.5, 0.99))
    say("swap latency ms, p50 / p99", f"{p50:.0f} / {p99:.0f}")
    _say_latency(seen)
    if seen.swapper.count("set", "gate") < 0.3 * options.swaps or seen.swapper.count("gate") < 0.1 * options.swaps:
        problems.append("too few sets, or sets with the gate")
    if options.mutant:
        caught = harm(found) > 0
        print(f"mutant {options.mutant}: {'caught: ' + ', '.join(problems) if caught else 'NOT CAUGHT'}")
        return [] if caught else [f"the mutant {options.mutant} was not caught"]
    if overlaps < options.overlaps:
        problems.append(f"{overlaps} replies overlapped a flip")
    return problems


def _say_latency(seen: Swapped) -> None:
    parts, times, count = (seen.steady, seen.during), seen.times, seen.load.count
    before, during, after = (rows_per_second(seen.load.seen, times[n], times[n + 1], count) for n in range(3))
    quiet = (times[1] - times[0], times[3] - times[2])
    medians = [1000 * quantile((one.latency for one in part), 0.5) for part in parts]
    steady_p99, during_p99 = (p99_ms(part) for part in parts)
    ratio = during_p99 / steady_p99
    say("latency p50 ms, steady / during swaps", f"{medians[0]:.1f} / {medians[1]:.1f}")
    say("latency p99 ms, steady / during swaps", f"{steady_p99:.1f} / {during_p99:.1f}")
    say("p99 ratio", ratio, f"<= {P99_LIMIT:g}, aim 1.1")
    steady = (before * quiet[0] + after * quiet[1]) / sum(quiet)
    say("rows/s, steady / during swaps", f"{steady:.0f} / {during:.0f}")
    if ratio > P99_LIMIT:
        print(f"note: p99 ratio {ratio:.2f} is above {P99_LIMIT:g}, which is the aim on an otherwise idle machine")

"""`soak-swap`: thousands of swaps in a row on one cluster; memory, file descriptors and latencies must not drift."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil

from .figures import between, harm, p99_ms, quantile, say, say_judged
from .mesh import Mesh, processes
from .swaps import Swapper, make_swap

WINDOW = 200
SAMPLE_EVERY = 10
ACTORS = {"router": "RouterActor", "controller": "ControllerActor", "replica": "ExpertActor", "raylet": "raylet/raylet"}
MEMORY, DESCRIPTORS = "memory MB", "descriptors"
LIMITS = {MEMORY: 20.0, DESCRIPTORS: 5.0}
OWN = "owner"
"""This process: it owns the cluster, and keeps every version and reply for the checker, so its memory has to grow."""

LATENCY_LIMIT = 2.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.set_defaults(experts=2)
    parser.add_argument("--swaps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second beside the swaps")


def cluster(options: argparse.Namespace) -> dict[str, Any]:
    """The usual one."""
    return {}


def sample(held: dict[tuple[str, str], list[float]]) -> None:
    """Note what every process of the cluster holds: megabytes that are its alone, and open file descriptors.

    Of several replicas, and of Ray's own, each is noted on its own.
    """
    for name, process in [*_named(), (OWN, psutil.Process())]:
        held[MEMORY, name].append(process.memory_full_info().uss / 2**20)
        held[DESCRIPTORS, name].append(process.num_fds())


def _named() -> Iterator[tuple[str, psutil.Process]]:
    for name, word in ACTORS.items():
        for place, process in enumerate(sorted(processes(word), key=lambda process: process.pid)):
            yield (f"{name} {place}" if place else name), process


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """Swap and swap, and compare the first with the last."""
    window = min(WINDOW, options.swaps // 2)
    swapper, draw, times = Swapper(mesh), random.Random(3), [time.monotonic()]
    held: dict[tuple[str, str], list[float]] = defaultdict(list)
    kinds = ("one", "one", "set", "one", "gate")
    with mesh.load(rate=options.rate) as load:
        for number in range(options.swaps):
            made = make_swap(mesh, kinds[number % len(kinds)], draw)
            swapper.swap(made)
            for path in made.paths.values():
                path.unlink()
            times.append(time.monotonic())
            if number % SAMPLE_EVERY == 0:
                sample(held)
    found = say_judged(mesh.checker(), load)
    problems = [f"{harm(found)} requests failed or were wrong"] if harm(found) else []
    problems += swapper.say(options.swaps, times[-1] - times[0])
    problems += _latency("swap", swapper.seconds[:window], swapper.seconds[-window:])
    first, last = between(load.seen, times[0], times[window]), between(load.seen, times[-window - 1], times[-1])
    problems += _latency("request", [one.latency for one in first], [one.latency for one in last])
    say("request p99 ms, first / last", f"{p99_ms(first):.1f} / {p99_ms(last):.1f}")
    return problems + _drift(held, max(1, window // SAMPLE_EVERY))


def _latency(what: str, first: list[float], last: list[float]) -> list[str]:
    """Compare the latencies, in seconds, of the first and the last swaps."""
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        pair = f"{1000 * quantile(first, share):.1f} / {1000 * quantile(last, share):.1f}"
        say(f"{what} latency ms {name}, first / last {WINDOW}", pair)
    slower = quantile(last, 0.5) / quantile(first, 0.5)
    return [f"{what} latency rose {slower:.2f} times"] if not slower <= LATENCY_LIMIT else []


def _drift(held: dict[tuple[str, str], list[float]], count: int) -> list[str]:
    """Compare the medians over the first and the last samples, process by process."""
    problems = []
    for (what, name), values in sorted(held.items(), key=lambda one: [*LIMITS].index(one[0][0])):
        first, last = statistics.median(values[:count]), statistics.median(values[-count:])
        middle = statistics.median(values[(len(values) - count) // 2 :][:count])
        say(f"{what}, {name}, first/middle/last", f"{first:.1f} / {middle:.1f} / {last:.1f}", f"{last - first:+.1f}")
        if last - first > LIMITS[what] and (what, name) != (MEMORY, OWN):
            problems.append(f"{what} of {name} grew by {last - first:.1f}")
    return problems

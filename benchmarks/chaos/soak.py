"""`soak-swap`: thousands of swaps in a row on one cluster; memory, file descriptors and latencies must not drift."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

import psutil

from .checker import Checker
from .figures import between, harm, judged, p99_ms, quantile, say, say_judged, say_load
from .load import Load
from .mesh import Mesh, chaos_mesh, processes
from .swaps import Swapper, make_swap

WINDOW = 200
SAMPLE_EVERY = 10
ACTORS = {"router": "RouterActor", "controller": "ControllerActor", "replica": "ExpertActor", "raylet": "raylet/raylet"}
MEMORY = "memory MB"
MEMORY_LIMIT = 20.0
OWN = "owner"
"""This process: it owns the cluster, and keeps every version and reply for the checker, so its memory has to grow."""

DESCRIPTOR_LIMIT = 5
LATENCY_LIMIT = 2.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second beside the swaps")


@dataclass
class Samples:
    """What processes hold, by name: megabytes that are theirs alone, and open file descriptors."""

    memory: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    descriptors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def take(self) -> None:
        """Look at every process of the cluster once; of several replicas, and of Ray's own, each on its own."""
        for name, word in ACTORS.items():
            for place, process in enumerate(sorted(processes(word), key=lambda process: process.pid)):
                self._add(name if not place else f"{name} {place}", process)
        self._add(OWN, psutil.Process())

    def _add(self, name: str, process: psutil.Process) -> None:
        self.memory[name].append(process.memory_full_info().uss / 2**20)
        self.descriptors[name].append(process.num_fds())


def main(options: argparse.Namespace) -> int:
    """Run it; 0 when nothing drifts."""
    with chaos_mesh(
        "soak-swap", experts=options.experts, replicas=options.replicas, transport=options.transport
    ) as mesh:
        problems = run(mesh, options)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """Swap and swap, and compare the first with the last."""
    window = min(WINDOW, options.swaps // 2)
    load = Load(mesh.cluster.endpoint, mesh.shape.layer, rate=options.rate).start()
    swapper, samples, draw, times = Swapper(mesh), Samples(), random.Random(3), [time.monotonic()]
    kinds = ("one", "one", "set", "one", "gate")
    try:
        for number in range(options.swaps):
            made = make_swap(mesh.files, kinds[number % len(kinds)], draw)
            swapper.swap(made)
            for path in made.paths.values():
                path.unlink()
            times.append(time.monotonic())
            if number % SAMPLE_EVERY == 0:
                samples.take()
    finally:
        load.stop()
    checker = Checker(mesh.shape, mesh.ledger)
    found = judged(checker, load)
    say_judged(found, checker, load)
    say("swaps committed in a row", len(swapper.committed), f"{options.swaps} in {times[-1] - times[0]:.0f} s")
    say("  asked again while draining", swapper.draining)
    for refusal in swapper.refused[:3]:
        print(f"    swap refused: {refusal}")
    problems = [f"{harm(found)} requests failed or were wrong"] if harm(found) else []
    if len(swapper.committed) < options.swaps:
        problems.append(f"only {len(swapper.committed)} of {options.swaps} swaps were committed")
    first, last = between(load.seen, times[0], times[window]), between(load.seen, times[-window - 1], times[-1])
    problems += _latency(
        "swap", [1000 * one for one in swapper.seconds[:window]], [1000 * one for one in swapper.seconds[-window:]]
    )
    problems += _latency("request", [1000 * one.latency for one in first], [1000 * one.latency for one in last])
    say("request p99 ms, first / last", f"{p99_ms(first):.1f} / {p99_ms(last):.1f}")
    problems += _drift(MEMORY, samples.memory, window, MEMORY_LIMIT)
    problems += _drift("descriptors", samples.descriptors, window, DESCRIPTOR_LIMIT)
    say_load()
    return problems


def _latency(what: str, first: list[float], last: list[float]) -> list[str]:
    pairs = [(quantile(first, share), quantile(last, share)) for share in (0.5, 0.99)]
    say(f"{what} latency ms p50, first / last {WINDOW}", f"{pairs[0][0]:.1f} / {pairs[0][1]:.1f}")
    say(f"{what} latency ms p99, first / last {WINDOW}", f"{pairs[1][0]:.1f} / {pairs[1][1]:.1f}")
    slower = pairs[0][1] / pairs[0][0]
    return [f"{what} latency rose {slower:.2f} times"] if not slower <= LATENCY_LIMIT else []


def _drift(what: str, found: dict[str, list[float]], window: int, limit: float) -> list[str]:
    """Compare the medians over the first and the last swaps, process by process."""
    problems = []
    count = max(1, window // SAMPLE_EVERY)
    for name, values in found.items():
        first, last = statistics.median(values[:count]), statistics.median(values[-count:])
        middle = statistics.median(values[(len(values) - count) // 2 :][:count])
        say(f"{what}, {name}, first/middle/last", f"{first:.1f} / {middle:.1f} / {last:.1f}", f"{last - first:+.1f}")
        if last - first > limit and (what, name) != (MEMORY, OWN):
            problems.append(f"{what} of {name} grew by {last - first:.1f}")
    return problems

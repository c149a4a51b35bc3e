"""`scaling`: an expert is scaled 1 -> 4 -> 1 fifty times under load, nothing is left; and what four replicas carry."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmarks.chaos.figures import harm, quantile, say, say_judged
from benchmarks.chaos.load import Load, capacity
from benchmarks.chaos.mesh import Mesh, chaos_mesh, wait_until
from benchmarks.leak import left_over

from expertmesh import Expert, Layer, TensorSpec, gates

FACTOR = 3.5
ENDS_SECONDS = 30.0
ROWS = 8200
"""Rows of a request to the expert that waits: two of them do not fit into one message, so each is a batch."""

CALLERS = 12
"""Requests in flight: for each of four replicas one that is computed and two that wait."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second beside the scaling")
    parser.add_argument("--seconds", type=float, default=8.0, help="for which each capacity is measured")


def run(options: argparse.Namespace) -> list[str]:
    """The cycles, then the capacities."""
    rows = TensorSpec((4,), "float32")
    waiting = Expert("benchmarks.scaling.waits:wait", framework="numpy", num_cpus=0, input=rows, output=rows)
    more = (Layer("waits", gates.Fixed([1.0]), {"e": waiting}, input=rows),)
    settings = {"max_rows_in_flight": 4 * ROWS * CALLERS}  # what is asked for must be the replicas' to refuse
    with chaos_mesh("scaling", experts=2, replicas=1, more=more, settings=settings) as mesh:
        cycled = cycles(mesh, options) if options.cycles else []
        return [*cycled, *carried(mesh, options)]


def cycles(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """Up and down under load, and what there is before and after."""
    id, took = mesh.shape.expert_ids[0], list[float]()
    with mesh.load(rate=options.rate) as load:
        _cycle(mesh, id, options.replicas)  # the first one starts what stays
        before = counted(mesh)
        for _ in range(options.cycles):
            began = time.monotonic()
            _cycle(mesh, id, options.replicas)
            took.append(time.monotonic() - began)
        wait_until(lambda: counted(mesh)["processes"] <= before["processes"] or None, ENDS_SECONDS, "processes end")
        time.sleep(2.0)
        after = counted(mesh)
    found = say_judged(mesh.checker(), load)
    say(f"cycles 1 -> {options.replicas} -> 1", len(took), f"{quantile(took, 0.5):.1f} s each, {max(took):.1f} at most")
    problems = [f"{harm(found)} requests failed or were wrong"] if harm(found) else []
    for what, number in before.items():
        allowed = number + (3 if "descriptors" in what or "threads" in what else 0)
        say(f"{what}, before / after", f"{number} / {after[what]}", f"<= {allowed}")
        problems += [f"{after[what] - number} {what} more than before"] if after[what] > allowed else []
    return problems


def carried(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """The rows a second that one replica carries of an expert that waits, and several."""
    inputs = [np.full((ROWS, 4), number, np.float32) for number in range(4)]
    found: dict[int, list[float]] = {}
    for replicas in (1, options.replicas, 1, options.replicas):
        mesh.client.scale("waits/e", replicas)
        load = Load(mesh.cluster.endpoint, "waits", callers=CALLERS, count=ROWS, inputs=inputs)
        found.setdefault(replicas, []).append(capacity(load, seconds=options.seconds))
        failed = sum(bool(one.error) for one in load.seen)
        say(f"  rows/s with {replicas}, failed", f"{found[replicas][-1]:.0f}, {failed}")
    factor = sum(found[options.replicas]) / sum(found[1])
    say(f"{options.replicas} replicas carry so many times the rows of one", factor, f">= {FACTOR:g}")
    return [] if factor >= FACTOR else [f"{options.replicas} replicas carry only {factor:.2f} times the rows of one"]


def counted(mesh: Mesh) -> dict[str, int]:
    """How much there is of everything that a replica brings."""
    left: dict[str, Any] = {kind: len(found) for kind, found in left_over().items()}
    router = psutil.Process(mesh.client.status()["router"]["pid"])
    folder = Path(mesh.cluster._running().temp_dir or os.devnull) / "channel"
    return {
        **left,
        "sockets of replicas": sum(path.is_socket() for path in folder.glob("*")),
        "descriptors of the router": router.num_fds(),
        "threads of the router": router.num_threads(),
        "descriptors of the owner": psutil.Process().num_fds(),
        "threads of the owner": psutil.Process().num_threads(),
    }


def _cycle(mesh: Mesh, id: str, most: int) -> None:
    for replicas in (most, 1):
        mesh.client.scale(id, replicas)

"""`slow`: a layer whose expert takes half a second a row, asked for twice what it bears, beside a quick layer."""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np

from expertmesh import Expert, Layer, TensorSpec, gates

from .checker import Checker
from .figures import between, harm, judged, p99_ms, quantile, say, say_judged, say_load
from .load import Load, SeenEpoch, capacity
from .mesh import Mesh, chaos_mesh

LOAD_SHARE = 0.3
RATIO_LIMIT = 1.5
SLOW_TIMEOUT = 5.0
LATE_SECONDS = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of each of four parts: quick alone, with slow, ..."
    )
    parser.add_argument("--slow", type=float, default=0.5, help="seconds a row of the slow expert")
    parser.add_argument("--times", type=float, default=2.0, help="load of the slow layer, in times of what it bears")


def main(options: argparse.Namespace) -> int:
    """Run it; 0 when the quick layer is hardly disturbed."""
    rows = TensorSpec((4,), "float32")
    slow = Expert(
        "expertmesh.experts.chaos:SlowExpert", kwargs={"seconds": options.slow}, num_cpus=0, input=rows, output=rows
    )
    layer = Layer("slow", gates.Fixed([1.0]), {"e0": slow}, input=rows)
    with chaos_mesh(
        "slow-layer", experts=options.experts, replicas=1, more=(layer,), transport=options.transport
    ) as mesh:
        problems = run(mesh, options)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """The quick layer alone, beside the slow one, alone, beside it: p99 of both."""
    endpoint = mesh.cluster.endpoint
    full = capacity(endpoint, mesh.shape.layer, seconds=4.0)
    say("capacity of the quick layer, rows/s", full)
    load = Load(endpoint, mesh.shape.layer, rate=LOAD_SHARE * full / 4).start()
    spans: dict[bool, list[SeenEpoch]] = {False: [], True: []}
    asked: list[SeenEpoch] = []
    try:
        for beside in (False, True, False, True):
            begin = time.monotonic()
            if beside:
                asked += _slow_load(endpoint, options)
                end = begin + options.seconds
            else:
                time.sleep(options.seconds)
                end = time.monotonic()
            spans[beside] += between(list(load.seen), begin, end)
    finally:
        load.stop()
    checker = Checker(mesh.shape, mesh.ledger)
    found = judged(checker, load)
    say_judged(found, checker, load)
    ratio = p99_ms(spans[True]) / p99_ms(spans[False])
    say("quick layer, p99 ms, alone / beside slow", f"{p99_ms(spans[False]):.1f} / {p99_ms(spans[True]):.1f}")
    say("p99 ratio", ratio, f"<= {RATIO_LIMIT:g}")
    late = _say_slow(asked)
    say_load()
    problems = [f"{harm(found)} requests to the quick layer failed or were wrong"] if harm(found) else []
    if not ratio <= RATIO_LIMIT:
        problems.append(f"p99 of the quick layer rose {ratio:.2f} times")
    return problems + ([f"{late} requests to the slow layer ended after their deadline"] if late else [])


def _slow_load(endpoint: str, options: argparse.Namespace) -> list[SeenEpoch]:
    inputs = [np.full((1, 4), number, np.float32) for number in range(16)]
    load = Load(
        endpoint, "slow", rate=options.times / options.slow, count=1, timeout=SLOW_TIMEOUT, inputs=inputs
    ).start()
    time.sleep(options.seconds)
    return load.stop()


def _say_slow(asked: list[SeenEpoch]) -> int:
    ends = Counter(one.error.partition(":")[0] or "answered" for one in asked)
    say("slow layer, requests", len(asked), ", ".join(f"{number} {name}" for name, number in ends.most_common()))
    say("slow layer, seconds from sending, p50", quantile((one.done - one.sent for one in asked), 0.5))
    return sum(one.done - one.sent > SLOW_TIMEOUT + LATE_SECONDS for one in asked)

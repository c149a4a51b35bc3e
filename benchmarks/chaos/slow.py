"""`slow`: a layer whose expert takes half a second a row, asked for twice what it bears, beside a quick layer."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import numpy as np

from expertmesh import Expert, Layer, TensorSpec, gates

from .figures import between, harm, p99_ms, quantile, say, say_judged
from .load import Load, SeenEpoch
from .mesh import Mesh

LOAD_SHARE = 0.3
RATIO_LIMIT = 1.5
SLOW_TIMEOUT = 5.0
LATE_SECONDS = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.set_defaults(experts=2, replicas=1)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of each of four parts: quick alone, with slow, ..."
    )
    parser.add_argument("--slow", type=float, default=0.5, help="seconds a row of the slow expert")
    parser.add_argument("--times", type=float, default=2.0, help="load of the slow layer, in times of what it bears")


def cluster(options: argparse.Namespace) -> dict[str, Any]:
    """The slow layer beside the quick one."""
    rows, factory = TensorSpec((4,), "float32"), "expertmesh.experts.chaos:SlowExpert"
    slow = Expert(factory, kwargs={"seconds": options.slow}, num_cpus=0, input=rows, output=rows)
    return {"more": (Layer("slow", gates.Fixed([1.0]), {"e0": slow}, input=rows),)}


def run(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """The quick layer alone, beside the slow one, alone, beside it: p99 of both."""
    spans: dict[bool, list[SeenEpoch]] = {False: [], True: []}
    asked: list[SeenEpoch] = []
    with mesh.load(rate=mesh.rate(LOAD_SHARE, seconds=4.0)) as load:
        for beside in (False, True, False, True):
            begin = time.monotonic()
            if beside:
                asked += _slow_load(mesh.cluster.endpoint, options)
                end = begin + options.seconds
            else:
                time.sleep(options.seconds)
                end = time.monotonic()
            spans[beside] += between(list(load.seen), begin, end)
    found = say_judged(mesh.checker(), load)
    ratio = p99_ms(spans[True]) / p99_ms(spans[False])
    say("quick layer, p99 ms, alone / beside slow", f"{p99_ms(spans[False]):.1f} / {p99_ms(spans[True]):.1f}")
    say("p99 ratio", ratio, f"<= {RATIO_LIMIT:g}")
    late = _say_slow(asked)
    problems = [f"{harm(found)} requests to the quick layer failed or were wrong"] if harm(found) else []
    if not ratio <= RATIO_LIMIT:
        problems.append(f"p99 of the quick layer rose {ratio:.2f} times")
    return problems + ([f"{late} requests to the slow layer ended after their deadline"] if late else [])


def _slow_load(endpoint: str, options: argparse.Namespace) -> list[SeenEpoch]:
    inputs = [np.full((1, 4), number, np.float32) for number in range(16)]
    rate = options.times / options.slow
    with Load(endpoint, "slow", rate=rate, count=1, timeout=SLOW_TIMEOUT, inputs=inputs) as load:
        time.sleep(options.seconds)
    return load.seen


def _say_slow(asked: list[SeenEpoch]) -> int:
    ends = Counter(one.error.partition(":")[0] or "answered" for one in asked)
    say("slow layer, requests", len(asked), ", ".join(f"{number} {name}" for name, number in ends.most_common()))
    say("slow layer, seconds from sending, p50", quantile((one.done - one.sent for one in asked), 0.5))
    return sum(one.done - one.sent > SLOW_TIMEOUT + LATE_SECONDS for one in asked)

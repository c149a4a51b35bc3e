"""C8: SIGKILL of one of two replicas under load: what failed, the longest silence, what was lost."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.chaos.checker import Checker
from benchmarks.chaos.figures import between, harm, judged, longest_gap, p99_ms, rows_per_second
from benchmarks.chaos.kill import LOAD_SHARE, Killer
from benchmarks.chaos.load import Load, capacity
from benchmarks.chaos.mesh import chaos_mesh

from .case import at_most
from .stated import figure, timeline
from .verdict import Line

REPLICAS, COUNT = 2, 4


def run(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """Lines and timeline."""
    experts, steady, seconds, every = (2, 3.0, 6.0, 6.0) if quick else (4, 8.0, 28.0, 7.0)
    with chaos_mesh("bench-kill", experts=experts, replicas=REPLICAS) as mesh:
        endpoint, layer = mesh.cluster.endpoint, mesh.shape.layer
        rate = LOAD_SHARE * capacity(endpoint, layer, count=COUNT, seconds=2.0) / COUNT
        load = Load(endpoint, layer, rate=rate, count=COUNT).start()
        killer = Killer(mesh, REPLICAS)
        try:
            time.sleep(steady)
            begin = time.monotonic()
            killer.run(seconds, every)
        finally:
            load.stop()
        found = judged(Checker(mesh.shape, mesh.ledger), load)
    end = begin + seconds
    before, during = between(load.seen, begin - steady, begin), between(load.seen, begin, end)
    offered = len(during) * COUNT / seconds
    loss = 1 - rows_per_second(load.seen, begin, end, COUNT) / offered
    load_text = f"{killer.kills} kills, {rate:.0f} requests/s of {COUNT} rows, 2 replicas"
    lines = [
        figure("C8", f"requests that failed or were wrong, of {found['requests']}", harm(found), at_most(0), load_text),
        figure("C8", "longest gap between completions, ms", 1000 * longest_gap(load.seen, begin, end), at_most(100)),
        figure("C8", "longest gap before any kill, ms", 1000 * longest_gap(load.seen, begin - steady / 2, begin)),
        figure("C8", "rows lost of those offered, %", 100 * loss, at_most(2)),
        figure("C8", "latency p99 with kills, ms", p99_ms(during), note=f"steady {p99_ms(before):.1f}"),
        figure("C8", "seconds until a killed replica is ready again, most", max(killer.back, default=float("nan"))),
    ]
    return lines, timeline(load.seen, begin - steady, killer.times, "kill")

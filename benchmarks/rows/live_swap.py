"""C9: an expert of 16.8 MB is swapped every second under load: the tail, how soon it is seen, and no mixed answer."""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.chaos.checker import Checker
from benchmarks.chaos.figures import between, judged, p99_ms, quantile
from benchmarks.chaos.flip_times import CONTROLLER, ROUTER, flip_delays, flip_times
from benchmarks.chaos.kill import LOAD_SHARE
from benchmarks.chaos.load import Load, capacity
from benchmarks.chaos.mesh import chaos_mesh
from benchmarks.chaos.swaps import Swapper, make_swap, paced

from .case import at_most
from .stated import against, figure, quantile_ratio, timeline
from .verdict import Line

COUNT = 4
BYTES = 2 * 1024 * 4096 * 2
"""What an expert of L has in bf16: 16.8 MB."""


def run(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """Lines and timeline."""
    experts, quiet, seconds = (2, 2.0, 6) if quick else (4, 8.0, 25)
    with chaos_mesh("bench-swap", experts=experts, replicas=1, ballast=BYTES, actors=ROUTER | CONTROLLER) as mesh:
        draw = random.Random(0)
        swaps = [make_swap(mesh.files, "one", draw) for _ in range(seconds)]
        endpoint, layer = mesh.cluster.endpoint, mesh.shape.layer
        rate = LOAD_SHARE * capacity(endpoint, layer, count=COUNT, seconds=2.0) / COUNT
        load = Load(endpoint, layer, rate=rate, count=COUNT).start()
        swapper, times = Swapper(mesh), [time.monotonic()]
        try:
            time.sleep(quiet)
            times.append(time.monotonic())
            paced(swapper, swaps, float(seconds))
            time.sleep(max(0.0, times[1] + seconds - time.monotonic()))
            times.append(time.monotonic())
            time.sleep(quiet)
            times.append(time.monotonic())
        finally:
            load.stop()
        found = judged(Checker(mesh.shape, mesh.ledger), load)
        delays, flips = flip_delays(swapper.epochs), flip_times(swapper.epochs)
    steady = between(load.seen, times[0], times[1]) + between(load.seen, times[2], times[3])
    during = between(load.seen, times[1], times[2])
    wrong = found["failed"] + found["wrong"] + found["went back"]
    what = f"latency p99 ms, a swap each second against steady ({rate:.0f} requests/s of {COUNT} rows)"
    ratio = quantile_ratio(during, steady, 0.99)
    lines = [
        against("C9", what, (p99_ms(during), p99_ms(steady)), "steady", ratio, at_most(1.5)),
        figure("C9", "from commit until the router serves it, ms, most", 1000 * max(delays, default=float("nan")),
               at_most(15), f"median {1000 * quantile(delays, 0.5):.1f}"),
        figure("C9", f"mixed answers, of {found['requests']} that were recomputed", found["mixed"], at_most(0)),
        figure("C9", "failed, wrong or older answers", wrong, at_most(0)),
        figure("C9", f"swaps committed of {seconds}", len(swapper.committed),
               note=f"{swapper.draining} asked again while draining; " + "; ".join(swapper.refused[:1])),
        figure("C9", "a swap from ask to answer, ms, p50", 1000 * quantile(swapper.seconds, 0.5)),
    ]  # fmt: skip
    return lines, timeline(load.seen, times[0], flips, "swap")

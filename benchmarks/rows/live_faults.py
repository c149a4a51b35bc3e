"""C8 and C9, on clusters whose answers are recomputed: a replica is killed, and an expert is swapped every second.

C8: SIGKILL of one of two replicas under load: what failed, the longest silence, what was lost. C9: an expert of 16.8 MB
is swapped every second under load: the tail, how soon it is seen, and no mixed answer.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.chaos.figures import between, harm, judged, longest_gap, p99_ms, quantile, rows_per_second
from benchmarks.chaos.kill import killed
from benchmarks.chaos.load import LOAD_SHARE, SeenEpoch
from benchmarks.chaos.mesh import chaos_mesh
from benchmarks.chaos.signals import flip_delays, flip_times
from benchmarks.chaos.swap import ROUTER
from benchmarks.chaos.swaps import make_swap, swapped
from benchmarks.compare import Ratio

from .case import at_most
from .verdict import Line, against, figure

REPLICAS, COUNT = 2, 4
BYTES = 2 * 1024 * 4096 * 2
"""What an expert of L has in bf16: 16.8 MB."""

NOTING = {**ROUTER, "ControllerActor": "benchmarks.chaos.actors:NotingControllerActor"}


def kills(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """Lines and timeline of C8."""
    experts, steady, seconds, every = (2, 3.0, 6.0, 6.0) if quick else (4, 8.0, 28.0, 7.0)
    with chaos_mesh("bench-kill", experts=experts, replicas=REPLICAS) as mesh:
        load = mesh.load(rate=mesh.rate(LOAD_SHARE, count=COUNT, seconds=2.0), count=COUNT)
        killer, begin = killed(mesh, load, REPLICAS, steady=steady, seconds=seconds, every=every)
        found = judged(mesh.checker(), load)
    end = begin + seconds
    before, during = between(load.seen, begin - steady, begin), between(load.seen, begin, end)
    offered = len(during) * COUNT / seconds
    loss = 1 - rows_per_second(load.seen, begin, end, COUNT) / offered
    load_text = f"{len(killer.times)} kills, {load.rate:.0f} requests/s of {COUNT} rows, 2 replicas"
    lines = [
        figure("C8", f"requests that failed or were wrong, of {found['requests']}", harm(found), at_most(0), load_text),
        figure("C8", "longest gap between completions, ms", 1000 * longest_gap(load.seen, begin, end), at_most(100)),
        figure("C8", "longest gap before any kill, ms", 1000 * longest_gap(load.seen, begin - steady / 2, begin)),
        figure("C8", "rows lost of those offered, %", 100 * loss, at_most(2)),
        figure("C8", "latency p99 with kills, ms", p99_ms(during), note=f"steady {p99_ms(before):.1f}"),
        figure("C8", "seconds until a killed replica is ready again, most", max(killer.back, default=float("nan"))),
    ]
    return lines, timeline(load.seen, begin - steady, killer.times, "kill")


def swaps(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """Lines and timeline of C9."""
    experts, quiet, seconds = (2, 2.0, 6) if quick else (4, 8.0, 25)
    with chaos_mesh("bench-swap", experts=experts, replicas=1, ballast=BYTES, actors=NOTING) as mesh:
        draw = random.Random(0)
        made = [make_swap(mesh, "one", draw) for _ in range(seconds)]
        load = mesh.load(rate=mesh.rate(LOAD_SHARE, count=COUNT, seconds=2.0), count=COUNT)
        seen = swapped(mesh, made, load, quiet=quiet, seconds=seconds, least=seconds)
        found, swapper = judged(mesh.checker(), load), seen.swapper
        delays, flips = flip_delays(swapper.epochs), flip_times(swapper.epochs)
    wrong = found["failed"] + found["wrong"] + found["went back"]
    what = f"latency p99 ms, a swap each second against steady ({load.rate:.0f} requests/s of {COUNT} rows)"
    ratio = quantile_ratio(seen.during, seen.steady, 0.99)
    lines = [
        against("C9", what, (p99_ms(seen.during), p99_ms(seen.steady)), "steady", ratio, at_most(1.5)),
        figure("C9", "from commit until the router serves it, ms, most", 1000 * max(delays, default=float("nan")),
               at_most(15), f"median {1000 * quantile(delays, 0.5):.1f}"),
        figure("C9", f"mixed answers, of {found['requests']} that were recomputed", found["mixed"], at_most(0)),
        figure("C9", "failed, wrong or older answers", wrong, at_most(0)),
        figure("C9", f"swaps committed of {seconds}", len(swapper.committed),
               note=f"{swapper.draining} asked again while draining; " + "; ".join(swapper.refused[:1])),
        figure("C9", "a swap from ask to answer, ms, p50", 1000 * quantile(swapper.seconds, 0.5)),
    ]  # fmt: skip
    return lines, timeline(load.seen, seen.times[0], flips, "swap")


def quantile_ratio(ours: Sequence[SeenEpoch], theirs: Sequence[SeenEpoch], share: float, draws: int = 500) -> Ratio:
    """The ratio of a quantile of latency in two spans; its interval draws whole seconds, as neighbours are alike."""
    generator = random.Random(0)
    mine, other = _by_second(ours), _by_second(theirs)

    def of(seconds: Iterable[list[float]]) -> float:
        return quantile((latency for latencies in seconds for latency in latencies), share)

    def drawn(seconds: list[list[float]]) -> float:
        return of(generator.choices(seconds, k=len(seconds)))

    ratios = sorted(drawn(mine) / drawn(other) for _ in range(draws))
    return Ratio(of(mine) / of(other), ratios[int(0.025 * draws)], ratios[int(0.975 * draws)])


def timeline(seen: Iterable[SeenEpoch], begin: float, marks: Sequence[float], name: str) -> dict[str, Any]:
    """Latencies over time, for a plot: seconds since `begin`, milliseconds, and the moments that are marked."""
    points = [(one.due - begin, None if one.error else 1000 * one.latency) for one in seen]
    return {
        "seconds": [round(moment, 4) for moment, _ in points],
        "milliseconds": [value if value is None else round(value, 3) for _, value in points],
        "marks": [round(moment - begin, 4) for moment in marks],
        "marked": name,
    }


def _by_second(seen: Sequence[SeenEpoch]) -> list[list[float]]:
    found: dict[int, list[float]] = defaultdict(list)
    for one in seen:
        found[int(one.due)].append(float("inf") if one.error else one.latency)
    return list(found.values())

"""Lines of rows that measure the product's own cluster: a figure, or a ratio of two, against a bound."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.chaos.figures import quantile
from benchmarks.chaos.load import SeenEpoch
from benchmarks.compare import Ratio

from .case import Target
from .verdict import NOT_REACHED, REACHED, Line, decided

OURS = "expertmesh"


def figure(row: str, what: str, value: float, target: Target | None = None, note: str = "") -> Line:
    """A figure that must keep a bound by itself."""
    verdict = (REACHED if target.met(value) else NOT_REACHED) if target else ""
    return Line(row, what, OURS, float(value), target=str(target or ""), verdict=verdict, note=note)


def against(row: str, what: str, pair: tuple[float, float], base: str, ratio: Ratio, target: Target | None) -> Line:
    """A figure and the one that it is compared with."""
    verdict = decided(ratio, target) if target else ""
    return Line(row, what, OURS, pair[0], {base: pair[1]}, ratio, str(target or ""), verdict)


def quantile_ratio(ours: Sequence[SeenEpoch], theirs: Sequence[SeenEpoch], share: float, draws: int = 500) -> Ratio:
    """The ratio of a quantile of latency in two spans; its interval draws whole seconds, as neighbours are alike."""
    generator = random.Random(0)
    seconds = [_by_second(ours), _by_second(theirs)]

    def drawn(by_second: list[list[float]]) -> float:
        picked = generator.choices(by_second, k=len(by_second))
        return quantile((value for values in picked for value in values), share)

    ratios = sorted(drawn(seconds[0]) / drawn(seconds[1]) for _ in range(draws))
    whole = [quantile((value for values in some for value in values), share) for some in seconds]
    return Ratio(whole[0] / whole[1], ratios[int(0.025 * draws)], ratios[int(0.975 * draws)])


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

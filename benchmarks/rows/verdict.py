"""The lines of the table: of a comparison one for each arm of ours, with the verdict on the best, or of one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.compare import Ratio, ratio
from benchmarks.peers.measure import Block

from .case import ADDED, FASTER, LIMIT, P50, RATE, Comparison, Target

REACHED, NOT_REACHED, CLOSE = "reached", "not reached", "the interval holds the bound"
SEE_OTHER = "see the other"
OURS = "expertmesh"
UNITS = {
    RATE: "rows/s",
    P50: "p50 ms",
    FASTER: "p50 ms, times faster",
    ADDED: "added latency (p50 ms shown)",
}
LITTLE = 1e-9


@dataclass(frozen=True)
class Line:
    """One line of the table. Values are in the unit that `what` says; `cpu` is CPU seconds for 1,000 rows."""

    row: str
    what: str
    ours: str
    value: float
    baselines: Mapping[str, float] = field(default_factory=dict)
    ratio: Ratio | None = None
    target: str = ""
    verdict: str = ""
    cpu: Mapping[str, float] = field(default_factory=dict)
    foreign: float = 0.0
    note: str = ""


def lines(
    row: str, comparison: Comparison, blocks: Mapping[str, Sequence[Block]], skipped: Mapping[str, str]
) -> list[Line]:
    """The lines of a comparison. `skipped` says why an arm has no blocks.

    A verdict says which baselines it had to do without: the best of all may have been among them.
    """
    target, measure = comparison.target, comparison.measure
    what, bound = f"{comparison.condition}: {UNITS[measure]}", str(target or "")
    values = {name: _value(measure, blocks[name]) for name in comparison.arms if name in blocks}
    missing = [f"{name}: {why}" for name, why in skipped.items() if name in comparison.arms]
    theirs = [name for name in comparison.theirs if name in values]
    ours = [name for name in comparison.ours if name in values]
    if not theirs or not ours or (measure == ADDED and LIMIT not in values):
        verdict = f"skipped: {'; '.join(missing)}"
        names = ours or comparison.ours[:1]
        return [Line(row, what, name, values.get(name, math.nan), target=bound, verdict=verdict) for name in names]
    rival = (max if measure == RATE else min)(theirs, key=lambda name: values[name])
    ratios = {name: _ratio(measure, name, rival, blocks) for name in ours}
    best = (max if measure in (RATE, FASTER) else min)(ours, key=lambda name: ratios[name].median)
    absent = [name for name in comparison.theirs if name not in values]
    verdict = decided(ratios[best], target) + (f", without {', '.join(absent)}" if absent else "") if target else ""
    shown = {name: value for name, value in values.items() if name not in comparison.ours}
    return [
        Line(
            row,
            what,
            name,
            values[name],
            shown,
            ratios[name],
            bound,
            verdict if name == best or not target else SEE_OTHER,
            {other: median(block.cpu_seconds for block in blocks[other]) for other in (name, *shown)},
            max(block.foreign for other in (name, *shown) for block in blocks[other]),
            "; ".join([*_added(measure, name, rival, values), *(f"skipped {why}" for why in missing)]),
        )
        for name in ours
    ]


def figure(row: str, what: str, value: float, target: Target | None = None, note: str = "") -> Line:
    """The line of a figure that must keep a bound by itself."""
    verdict = (REACHED if target.met(value) else NOT_REACHED) if target else ""
    return Line(row, what, OURS, float(value), target=str(target or ""), verdict=verdict, note=note)


def against(row: str, what: str, pair: tuple[float, float], base: str, ratio: Ratio, target: Target) -> Line:
    """The line of a figure and the one that it is compared with."""
    return Line(row, what, OURS, pair[0], {base: pair[1]}, ratio, str(target), decided(ratio, target))


def decided(ratio: Ratio, target: Target) -> str:
    """The verdict on a ratio: by its median, and whether its interval leaves that open."""
    verdict = REACHED if target.met(ratio.median) else NOT_REACHED
    sure = target.met(ratio.low) == target.met(ratio.high)
    return verdict if sure else f"{verdict} ({CLOSE})"


def _added(measure: str, ours: str, theirs: str, values: Mapping[str, float]) -> list[str]:
    """The milliseconds that an arm and its rival add to the layer in process, where that is what is compared."""
    if measure != ADDED:
        return []
    mine, other = (values[name] - values[LIMIT] for name in (ours, theirs))
    return [f"adds {mine:.2f} ms, {theirs} {other:.2f} ms"]


def _value(measure: str, seen: Sequence[Block]) -> float:
    """Rows a second, or milliseconds."""
    if measure == RATE:
        return median(block.rows_per_second for block in seen)
    return 1000 * median(block.p50 for block in seen)


def _ratio(measure: str, ours: str, theirs: str, blocks: Mapping[str, Sequence[Block]]) -> Ratio:
    rounds = [block.round for block in blocks[ours]]
    if measure == RATE:
        mine, other = ([block.rows_per_second for block in blocks[name]] for name in (ours, theirs))
        return ratio(mine, other, rounds=rounds)
    mine, other = ([block.p50 for block in blocks[name]] for name in (ours, theirs))
    if measure == FASTER:
        return ratio(other, mine, rounds=rounds)
    if measure == ADDED:
        limit = [block.p50 for block in blocks[LIMIT]]
        mine, other = ([p50 - less for p50, less in zip(some, limit, strict=True)] for some in (mine, other))
    return ratio(mine, [max(value, LITTLE) for value in other], rounds=rounds)

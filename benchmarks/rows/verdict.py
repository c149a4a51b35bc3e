"""What a comparison says once its blocks are measured: a line for each arm of ours, and the verdict on the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.compare import Ratio, ratio
from benchmarks.peers.measure import Block

from .case import ADDED, LIMIT, P50, RATE, Comparison, Target

REACHED, NOT_REACHED, CLOSE = "reached", "not reached", "the interval holds the bound"
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
    """The lines of a comparison. `skipped` says why an arm has no blocks."""
    theirs = [name for name in comparison.theirs if name in blocks]
    ours = [name for name in comparison.ours if name in blocks]
    missing = {name: why for name, why in skipped.items() if name in comparison.arms}
    if not theirs or not ours or (comparison.measure == ADDED and LIMIT not in blocks):
        why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        return [_skipped(row, comparison, name, blocks, why) for name in ours or comparison.ours[:1]]
    found = {name: _against(comparison, name, _best(comparison, theirs, blocks), blocks) for name in ours}
    higher = comparison.measure == RATE
    best = (max if higher else min)(found, key=lambda name: found[name].median)
    note = "; ".join(f"skipped {name}: {reason}" for name, reason in missing.items())
    absent = [name for name in comparison.theirs if name not in blocks]
    return [_line(row, comparison, name, found[name], blocks, name == best, note, absent) for name in ours]


def decided(ratio: Ratio, target: Target) -> str:
    """The verdict on a ratio: by its median, and whether its interval leaves that open."""
    verdict = REACHED if target.met(ratio.median) else NOT_REACHED
    sure = target.met(ratio.low) == target.met(ratio.high)
    return verdict if sure else f"{verdict} ({CLOSE})"


def _best(comparison: Comparison, theirs: Sequence[str], blocks: Mapping[str, Sequence[Block]]) -> str:
    if comparison.measure == RATE:
        return max(theirs, key=lambda name: _value(comparison, blocks[name]))
    return min(theirs, key=lambda name: _value(comparison, blocks[name]))


def _value(comparison: Comparison, seen: Sequence[Block]) -> float:
    """Rows a second, or milliseconds."""
    if comparison.measure == RATE:
        return statistics.median(block.rows_per_second for block in seen)
    return 1000 * statistics.median(block.p50 for block in seen)


def _against(comparison: Comparison, ours: str, theirs: str, blocks: Mapping[str, Sequence[Block]]) -> Ratio:
    rounds = [block.round for block in blocks[ours]]
    if comparison.measure == RATE:
        mine, other = ([block.rows_per_second for block in blocks[name]] for name in (ours, theirs))
        return ratio(mine, other, rounds=rounds)
    less = [0.0] * len(blocks[ours])
    if comparison.measure == ADDED:
        less = [block.p50 for block in blocks[LIMIT]]
    mine, other = (
        [block.p50 - part for block, part in zip(blocks[name], less, strict=True)] for name in (ours, theirs)
    )
    return ratio(mine, [max(value, LITTLE) for value in other], rounds=rounds)


def _line(
    row: str,
    comparison: Comparison,
    name: str,
    found: Ratio,
    blocks: Mapping[str, Sequence[Block]],
    best: bool,
    note: str,
    absent: Sequence[str],
) -> Line:
    """A verdict says which baselines it had to do without: the best of all may have been among them."""
    target = comparison.target
    without = f", without {', '.join(absent)}" if absent else ""
    shown = [other for other in comparison.arms if other in blocks and other not in comparison.ours]
    return Line(
        row,
        _what(comparison),
        name,
        _value(comparison, blocks[name]),
        {other: _value(comparison, blocks[other]) for other in shown},
        found,
        str(target) if target else "",
        (decided(found, target) + without if best else "see the other") if target else "",
        {other: statistics.median(b.cpu_seconds for b in blocks[other]) for other in (name, *shown)},
        max(block.foreign for other in (name, *shown) for block in blocks[other]),
        note,
    )


def _skipped(row: str, comparison: Comparison, name: str, blocks: Mapping[str, Sequence[Block]], why: str) -> Line:
    value = _value(comparison, blocks[name]) if name in blocks else float("nan")
    target = str(comparison.target) if comparison.target else ""
    return Line(row, _what(comparison), name, value, target=target, verdict=f"skipped: {why}")


def _what(comparison: Comparison) -> str:
    units = {RATE: "rows/s", P50: "p50 ms", ADDED: "added latency (p50 ms shown)"}
    return f"{comparison.condition}: {units[comparison.measure]}"

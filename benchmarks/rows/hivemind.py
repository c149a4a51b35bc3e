"""C7: hivemind in fp32. Its own client measures it, so its blocks and ours cannot take turns: ours lie around them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare import Ratio, ratio
from benchmarks.peers import hivemind
from benchmarks.peers.arm import ArmUnavailable
from benchmarks.peers.measure import Block

from .case import P50, RATE, Condition, Target, at_least
from .plan import Party
from .session import Effort, Session
from .verdict import Line, decided

ROWS = 512
LAYER = ("expertmesh_client", "expertmesh_client_2")


@dataclass(frozen=True)
class Part:
    """One comparison: our arms, the limit in process, what hivemind calls the same, and the bound of the factor."""

    what: str
    condition: Condition
    ours: tuple[str, ...]
    limit: str
    measure: str
    target: Target

    @property
    def party(self) -> Party:
        """What runs on our side."""
        return Party(self.condition, (*self.ours, self.limit))


PARTS = (
    Part("expert", Condition("L", "fp32", ROWS, 4), ("ffn",), "ffn_in_process", RATE, at_least(2)),
    Part("expert", Condition("L", "fp32", 1, 1), ("ffn",), "ffn_in_process", P50, at_least(3)),
    Part("layer", Condition("L", "fp32", ROWS, 1), LAYER, "in_process", RATE, at_least(25)),
)


def measured(row: str, effort: Effort, say: Callable[[str], None]) -> list[Line]:
    """The lines of the row."""
    half = Effort((effort.blocks + 1) // 2, effort.seconds)
    with Session(half, say) as session:
        before = [session.run(part.party) for part in PARTS]
        say("hivemind, by its own client")
        try:
            theirs = hivemind.measured(rows=ROWS, seconds=max(3.0, 3 * effort.seconds))
        except ArmUnavailable as error:
            return [Line(row, str(part.condition), "", math.nan, verdict=f"skipped: {error}") for part in PARTS]
        after = [session.run(part.party) for part in PARTS]
    lines = []
    for part, *runs in zip(PARTS, before, after, strict=True):
        blocks = {name: [found for run in runs for found in run.blocks.get(name, [])] for name in part.party.arms}
        lines.append(line(row, part, {name: found for name, found in blocks.items() if found}, theirs))
    return lines


def line(row: str, part: Part, blocks: Mapping[str, Sequence[Block]], theirs: Sequence[Mapping[str, Any]]) -> Line:
    """The line of a part: the best of our arms against the best that hivemind's client saw."""
    where, limit = part.condition, blocks.get(part.limit, [])
    blocks = {name: found for name, found in blocks.items() if name in part.ours}
    if not blocks:
        return Line(row, str(where), "", math.nan, target=str(part.target), verdict="skipped: no arm of ours ran")
    alike = [one for one in theirs if one["what"] == part.what and one["rows"] == where.rows]
    if part.measure == P50:
        other = 1000 * next(one["p50"] for one in alike if one["in_flight"] == 1)
        limits = [1000 * block.p50 for block in limit]
        values = {name: [1000 * block.p50 for block in found] for name, found in blocks.items()}
        factors = {name: ratio([other] * len(mine), mine) for name, mine in values.items()}
    else:
        other = max(one["rows_per_second"] for one in alike)
        limits = [block.rows_per_second for block in limit]
        values = {name: [block.rows_per_second for block in found] for name, found in blocks.items()}
        factors = {name: ratio(mine, [other] * len(mine)) for name, mine in values.items()}
    best = max(factors, key=lambda name: factors[name].median)
    found: Ratio = factors[best]
    unit = "p50 ms, times faster" if part.measure == P50 else RATE
    return Line(
        row,
        f"{part.what}, {where}: {unit}",
        best,
        statistics.median(values[best]),
        {"hivemind": other, **({part.limit: statistics.median(limits)} if limits else {})},
        found,
        str(part.target),
        decided(found, part.target),
        foreign=max(block.foreign for block in blocks[best]),
        note="not in turns: our blocks lie before and after its own",
    )

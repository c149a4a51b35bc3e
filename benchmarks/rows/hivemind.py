"""C7: hivemind in fp32. Its own client measures it, block by block, in turns with ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from benchmarks.compare import ratio
from benchmarks.peers import hivemind
from benchmarks.peers.arm import ArmUnavailable
from benchmarks.peers.measure import Block

from .case import P50, RATE, Condition, Target, at_least
from .plan import Party
from .session import Effort, Session
from .verdict import Line, decided

ROWS = 512
LAYER = ("expertmesh_client", "expertmesh_client_2")
LONGER = 4


@dataclass(frozen=True)
class Part:
    """One comparison: our arms, the limit in process, what hivemind calls the same, and the bound of the factor."""

    what: str
    condition: Condition
    ours: tuple[str, ...]
    limit: str
    measure: str
    target: Target

    def of(self, other: hivemind.Hivemind, seconds: float) -> dict[str, float]:
        """A block of hivemind's, `LONGER` times as long, because its calls take longer."""
        return other.block(self.what, self.condition.rows, self.condition.in_flight, LONGER * seconds)

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
    with ExitStack() as running:
        session = running.enter_context(Session(effort, say))
        say("starting hivemind, in its own environment")
        try:
            other = running.enter_context(closing(hivemind.Hivemind()))
            theirs: list[list[Mapping[str, float]]] = [[] for _ in PARTS]

            def between() -> None:
                for part, found in zip(PARTS, theirs, strict=True):
                    found.append(part.of(other, effort.seconds))

            ours = session.run([part.party for part in PARTS], between=between)
        except ArmUnavailable as error:
            return [Line(row, str(part.condition), "", math.nan, verdict=f"skipped: {error}") for part in PARTS]
    return [line(row, part, found.blocks, other) for part, found, other in zip(PARTS, ours, theirs, strict=True)]


def line(row: str, part: Part, blocks: Mapping[str, Sequence[Block]], theirs: Sequence[Mapping[str, float]]) -> Line:
    """The line of a part: the best of our arms against what hivemind's client saw in the same turns."""
    where, limit = part.condition, blocks.get(part.limit, [])
    ours = {name: blocks[name] for name in part.ours if name in blocks}
    if not ours:
        return Line(row, str(where), "", math.nan, target=str(part.target), verdict="skipped: no arm of ours ran")
    single = part.measure == P50
    values = {name: [1000 * b.p50 if single else b.rows_per_second for b in found] for name, found in ours.items()}
    other = [1000 * b["p50"] if single else b["rows_per_second"] for b in theirs]
    factors = {name: ratio(other, mine) if single else ratio(mine, other) for name, mine in values.items()}
    limits = [1000 * b.p50 if single else b.rows_per_second for b in limit]
    best = max(factors, key=lambda name: factors[name].median)
    unit = "p50 ms, times faster" if single else RATE
    return Line(
        row,
        f"{part.what}, {where}: {unit}",
        best,
        statistics.median(values[best]),
        {"hivemind": statistics.median(other), **({part.limit: statistics.median(limits)} if limits else {})},
        factors[best],
        str(part.target),
        decided(factors[best], part.target),
        foreign=max(block.foreign for block in ours[best]),
    )

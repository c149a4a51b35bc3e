"""Measures rows that are declared as comparisons, and gathers their lines, stages and blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers.measure import Block

from .case import Comparison, Condition, Row, alone
from .plan import Party, groups, parties, party_of
from .session import Effort, Measured, Session
from .stages import Stages
from .verdict import Line, lines

FULL, QUICK, TINY = Effort(7, 0.4, rounds=2, limit=1320), Effort(4, 0.2), Effort(1, 0.1)
"""The limit leaves 8 of the 30 minutes of all rows to those that have clusters of their own."""


@dataclass
class Result:
    """What a run has found."""

    lines: list[Line] = field(default_factory=list)
    stages: dict[Condition, Stages] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    timelines: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def blocks(self) -> list[dict[str, Any]]:
        """Every block by condition and arm, for plots and for machines."""
        return [
            asdict(found.party.condition) | {"arm": arm, "blocks": [_figures(block) for block in blocks]}
            for found in self.measured
            for arm, blocks in found.blocks.items()
        ]


def comparisons_of(row: Row, *, quick: bool, tiny: bool, without: Collection[str] = ()) -> list[Comparison]:
    """The comparisons of a row, the same one once, `without` some arms."""
    found = (one.tiny() if tiny else one for one in row.comparisons(quick or tiny))
    left = (one.without(without) for one in found)
    return list(dict.fromkeys(one for one in left if one is not None))


def measure(
    rows: Sequence[Row],
    effort: Effort,
    say: Callable[[str], None],
    *,
    quick: bool,
    tiny: bool,
    result: Result,
    without: Collection[str] = (),
    told: Callable[[], None] = lambda: None,
) -> None:
    """Measure declared rows into `result`; `told` after each group, so that a run that is cut off loses little.

    Arms run for as long as neighbouring parties need them. Each round measures all parties, with its part of blocks;
    those of the second are shorter where the first took so long that the limit is near.
    """
    wanted = {row.name: comparisons_of(row, quick=quick, tiny=tiny, without=without) for row in rows}
    planned = parties(one for found in wanted.values() for one in found)
    staged = {alone(one.condition) for row in rows if row.stages for one in wanted[row.name]}
    seen = dict[Party, Measured]()
    begin = time.monotonic()
    with Session(effort, say) as session:
        for round_ in range(effort.rounds):
            if round_ == 1:
                session.effort = effort.hurried(time.monotonic() - begin, session.timed)
                if session.effort != effort:
                    say(f"the machine is slow: blocks of {session.effort.seconds:.2f} s in the second round")
            blocks = effort.part(round_)
            for group in groups(planned) if blocks else ():
                for found in session.run(group, blocks=blocks, round_=round_, staged=staged - result.stages.keys()):
                    party = found.party
                    seen[party] = seen[party].joined(found) if party in seen else found
                    if found.stages is not None:
                        result.stages[alone(party.condition)] = found.stages
                result.measured = list(seen.values())
                result.versions = dict(session.versions)
                result.lines = list(_lines(wanted, planned, seen))
                told()


def _lines(
    wanted: Mapping[str, Sequence[Comparison]], planned: Sequence[Party], seen: Mapping[Party, Measured]
) -> Iterator[Line]:
    for row, comparisons in wanted.items():
        for one in comparisons:
            found = seen.get(party_of(one, planned))
            if found is not None:
                yield from lines(row, one, found.blocks, found.skipped)


def _figures(block: Block) -> dict[str, float]:
    return {name: value for name, value in asdict(block).items() if name != "latencies"} | {"p50": block.p50}

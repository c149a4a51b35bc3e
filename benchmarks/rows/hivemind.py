"""C7: hivemind in fp32. Its own client measures it, block by block, in turns with ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from benchmarks.peers import hivemind
from benchmarks.peers.arm import ArmUnavailable
from benchmarks.peers.measure import Block

from .case import FASTER, RATE, Comparison, Condition, at_least
from .plan import Party
from .session import Effort, Session
from .verdict import SEE_OTHER, Line, lines

THEIRS = ("hivemind",)
LAYER = ("expertmesh_client", "expertmesh_client_2")
LONGER = 4
"""A block of hivemind's is so many times as long, because its calls take longer."""

LARGE, ALONE, WHOLE = Condition("L", "fp32", 512, 4), Condition("L", "fp32", 1, 1), Condition("L", "fp32", 512, 1)
PARTS = (
    ("expert", Comparison(LARGE, ("ffn",), THEIRS, RATE, at_least(2), limit="ffn_in_process")),
    ("expert", Comparison(ALONE, ("ffn",), THEIRS, FASTER, at_least(3), limit="ffn_in_process")),
    ("layer", Comparison(WHOLE, LAYER, THEIRS, RATE, at_least(25))),
)
"""What hivemind calls the same, and the comparison."""

Part = tuple[str, Comparison]


def measured(row: str, effort: Effort, say: Callable[[str], None]) -> list[Line]:
    """The lines of the row."""
    with ExitStack() as running:
        session = running.enter_context(Session(effort, say))
        say("starting hivemind, in its own environment")
        theirs: list[list[Mapping[str, float]]] = [[] for _ in PARTS]
        try:
            other = running.enter_context(closing(hivemind.Hivemind()))

            def between() -> None:
                for (what, part), found in zip(PARTS, theirs, strict=True):
                    where = part.condition
                    found.append(other.block(what, where.rows, where.in_flight, LONGER * effort.seconds))

            parties = [Party(part.condition, (*part.ours, part.limit)) for _, part in PARTS]
            ours = session.run(parties, between=between)
        except ArmUnavailable as error:
            return [Line(row, str(part.condition), "", math.nan, verdict=f"skipped: {error}") for _, part in PARTS]
    return [line(row, part, found.blocks, other) for part, found, other in zip(PARTS, ours, theirs, strict=True)]


def line(row: str, part: Part, blocks: Mapping[str, Sequence[Block]], theirs: Sequence[Mapping[str, float]]) -> Line:
    """The line of a part: the best of our arms against what hivemind's client saw in the same turns."""
    what, comparison = part
    other = [Block(seen["rows_per_second"], (seen["p50"],), 0.0, 0.0) for seen in theirs]
    found = lines(row, comparison, {**blocks, THEIRS[0]: other}, dict.fromkeys(comparison.ours, "it did not run"))
    best = next(one for one in found if one.verdict != SEE_OTHER)
    return replace(best, what=f"{what}, {best.what}", cpu={}, note="")

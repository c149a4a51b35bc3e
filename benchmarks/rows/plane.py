"""C1 to C4: the data plane, its router in this process, against the layer without messages and on plain Ray."""

from __future__ import annotations

from .case import ADDED, LIMIT, PLACEMENTS, Comparison, Condition, Row, at_least, at_most

GOOD_RAY = ("ray_good", "ray_good_2", "ray_good_1")
"""With an actor for each expert, on two and on one: as the product's placements here."""


def _placements(quick: bool) -> tuple[str, ...]:
    """An actor for each expert takes long to start: a quick run goes without, and so without the table of stages."""
    return PLACEMENTS[1:] if quick else PLACEMENTS


def _against_the_limit(rows: int, bound: float, quick: bool) -> list[Comparison]:
    """bf16 decides; fp32 on two actors and, for a plot over actors, four of them are printed."""
    headline = Condition("L", "bf16", rows, 4)
    found = [Comparison(headline, _placements(quick), (LIMIT,), target=at_least(bound))]
    if not quick:
        found.append(Comparison(headline, ("expertmesh_4",), (LIMIT,)))
        found.append(Comparison(Condition("L", "fp32", rows, 4), PLACEMENTS[1:], (LIMIT,)))
    return found


def _added_latency(quick: bool) -> list[Comparison]:
    found = []
    ours = (*_placements(quick), "expertmesh_1")
    for theirs, bound in ((("ray_naive",), 0.10), (GOOD_RAY[1:] if quick else GOOD_RAY, 0.20)):
        for rows in (1, 64) if quick else (1, 8, 64):
            condition = Condition("S", "bf16", rows, 1)
            found.append(Comparison(condition, ours, theirs, ADDED, at_most(bound)))
    return found


def _against_naive_ray(quick: bool) -> list[Comparison]:
    small, large = Condition("S", "bf16", 32, 4), Condition("L", "bf16", 512, 4)
    return [
        Comparison(small, _placements(quick), ("ray_naive",), target=at_least(4.0)),
        Comparison(large, _placements(quick), ("ray_naive",), target=at_least(1.25)),
    ]


ROWS = (
    Row("C1", "rows/s against in-process, 512 rows", lambda quick: _against_the_limit(512, 0.93, quick), stages=True),
    Row("C2", "rows/s against in-process, 32 rows", lambda quick: _against_the_limit(32, 0.85, quick), stages=True),
    Row("C3", "added latency against added latency of Ray actors", _added_latency, stages=True),
    Row("C4", "rows/s against naive Ray actors", _against_naive_ray),
)

"""All rows by name, C1 to C13: those that are comparisons of arms are declared here.

C1 to C4 and C6 are called through `attach`, from a process with a router of its own: against the layer in process, Ray
actors, and all-to-all over gloo. C5 and C11 are the gRPC client against Ray Serve and a raw echo; C12 is one call
through each of the two doors.
"""

from __future__ import annotations

from .case import ADDED, LIMIT, P50, PLACEMENTS, RATE, Comparison, Condition, Row, at_least, at_most

NAMES = tuple(f"C{number}" for number in range(1, 14))
CLIENTS = ("expertmesh_client", "expertmesh_client_2")
TWO = ("expertmesh_2",)
ECHOES = ("grpc_echo", "grpc_echo_stream")
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


def _against_serve(quick: bool) -> list[Comparison]:
    """Requests of 4 rows: their ratio is that of rows. Serve's arms are started one after the other."""
    loaded, alone = Condition("S", "bf16", 4, 32), Condition("S", "bf16", 4, 1)
    bounds = {"ray_serve": 8.0, "ray_serve_optimised": 3.0, "ray_serve_batched": None}
    if quick:
        bounds = {"ray_serve_optimised": 3.0}
    ours = CLIENTS[1:] if quick else CLIENTS
    found = []
    for name, bound in bounds.items():
        target = None if bound is None else at_least(bound)
        found.append(Comparison(loaded, ours, (name,), RATE, target, limit=""))
        found.append(Comparison(alone, ours, (name,), P50, target and at_most(1 / 3), limit=""))
    return found


def _against_gloo(quick: bool) -> list[Comparison]:
    found = [
        Comparison(Condition("S", "bf16", rows, 4), TWO, ("gloo",), target=at_least(1.5))
        for rows in ((32,) if quick else (8, 32))
    ]
    found.append(Comparison(Condition("L", "bf16", 512, 4), TWO, ("gloo",), target=at_least(1.1)))
    if not quick:
        one, other = ("expertmesh_2_stalled",), ("gloo_stalled",)
        found.append(Comparison(Condition("S", "bf16", 32, 4), one, other, target=at_least(3.0), limit=""))
    return found


def _against_an_echo(quick: bool) -> list[Comparison]:
    """Rows of 2 KiB: goodput in one direction is the rate of rows. 512, 32 and 2 rows are 1 MiB, 64 KiB and 4 KiB."""
    found = []
    for rows in (512, 32, 2):
        condition = Condition("L", "bf16", rows, 4)
        target = at_least(0.9) if rows == 512 else None
        found.append(Comparison(condition, ("identity",), ECHOES, target=target, limit=""))
        if not quick:
            found.append(Comparison(condition, ("identity_actor",), ECHOES, limit=""))
    return found


def _through_each_door(quick: bool) -> list[Comparison]:
    """The same cluster in both arms: the experts on two actors, as in C5."""
    return [
        Comparison(Condition("S", "bf16", rows, 1), TWO, CLIENTS[1:], ADDED, at_most(0.5))
        for rows in ((1,) if quick else (1, 8))
    ]


_ROWS = (
    Row("C1", "rows/s against in-process, 512 rows", lambda quick: _against_the_limit(512, 0.93, quick), stages=True),
    Row("C2", "rows/s against in-process, 32 rows", lambda quick: _against_the_limit(32, 0.85, quick), stages=True),
    Row("C3", "added latency against added latency of Ray actors", _added_latency, stages=True),
    Row("C4", "rows/s against naive Ray actors", _against_naive_ray),
    Row("C5", "requests/s and p50 of the client against Ray Serve", _against_serve),
    Row("C6", "rows/s against all-to-all over gloo, 2 processes each", _against_gloo),
    Row("C11", "goodput of the client against a raw gRPC echo", _against_an_echo),
    Row("C12", "added latency of one call: attached against the client", _through_each_door),
)
DECLARED = {row.name: row for row in _ROWS}

"""C5, C6 and C11: the gRPC client against Ray Serve and a raw echo, and our actors against all-to-all over gloo."""

from __future__ import annotations

from .case import P50, RATE, Comparison, Condition, Row, at_least, at_most

CLIENTS = ("expertmesh_client", "expertmesh_client_2")
TWO = ("expertmesh_2",)
ECHOES = ("grpc_echo", "grpc_echo_stream")


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
        found.append(Comparison(loaded, ours, (name,), RATE, target, limit=False))
        found.append(Comparison(alone, ours, (name,), P50, target and at_most(1 / 3), limit=False))
    return found


def _against_gloo(quick: bool) -> list[Comparison]:
    found = [
        Comparison(Condition("S", "bf16", rows, 4), TWO, ("gloo",), target=at_least(1.5))
        for rows in ((32,) if quick else (8, 32))
    ]
    found.append(Comparison(Condition("L", "bf16", 512, 4), TWO, ("gloo",), target=at_least(1.1)))
    if not quick:
        one, other = ("expertmesh_2_stalled",), ("gloo_stalled",)
        found.append(Comparison(Condition("S", "bf16", 32, 4), one, other, target=at_least(3.0), limit=False))
    return found


def _against_an_echo(quick: bool) -> list[Comparison]:
    """Rows of 2 KiB: goodput in one direction is the rate of rows. 512, 32 and 2 rows are 1 MiB, 64 KiB and 4 KiB."""
    found = []
    for rows in (512, 32, 2):
        condition = Condition("L", "bf16", rows, 4)
        target = at_least(0.9) if rows == 512 else None
        found.append(Comparison(condition, ("identity",), ECHOES, target=target, limit=False))
        if not quick:
            found.append(Comparison(condition, ("identity_actor",), ECHOES, limit=False))
    return found


ROWS = (
    Row("C5", "requests/s and p50 of the client against Ray Serve", _against_serve),
    Row("C6", "rows/s against all-to-all over gloo, 2 processes each", _against_gloo),
    Row("C11", "goodput of the client against a raw gRPC echo", _against_an_echo),
)

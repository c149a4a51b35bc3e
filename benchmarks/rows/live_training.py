"""C13: a step of training through the client, against the same layer in this process, and against hivemind.

A step is forward, backward and an update by SGD of every expert, with the same gate, rows and weights. In process, the
best of one and two threads counts. hivemind has no update here, and fp32 alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import torch
from benchmarks.compare import ratio, turn
from benchmarks.home import own_home
from benchmarks.peers.arm import ArmUnavailable
from benchmarks.peers.hivemind import Hivemind
from benchmarks.peers.model import DTYPES, SHAPES, experts, gate, rows
from benchmarks.peers.product_host import LAYER, layer
from torch import Tensor

from expertmesh import Client, Cluster, RemoteMoE
from expertmesh.router.mixture.local import LocalLayer

from .case import at_least
from .verdict import Line, against

ROWS, RATE = 512, 1e-6
"""So small a learning rate that blocks compute the same."""

Step = Callable[[], object]


def run(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """The lines, and the seconds of each step by dtype and arm."""
    lines: list[Line] = []
    seconds: dict[str, Any] = {}
    with own_home():
        for dtype in ("fp32", "bf16"):
            found = seconds[dtype] = _measured(dtype, blocks=3 if quick else 7)
            lines += _lines(dtype, found)
    return lines, {"seconds": seconds}


def _measured(dtype: str, blocks: int) -> dict[str, list[float]]:
    """The median seconds of a step, by arm and block."""
    shape, kind = SHAPES["L"], DTYPES[dtype]
    x = rows(shape, ROWS, kind)
    target = torch.zeros_like(x)
    options: dict[str, Any] = {
        "port": 0,
        "metrics_port": None,
        "log_level": "warning",
        "name": f"bench-training-{dtype}",
    }
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster.start([layer("L", dtype, 2)], **options))
        client = stack.enter_context(Client(cluster.endpoint, timeout=120.0))
        session = client.train(LAYER, optimizer="torch.optim:SGD", lr=RATE, durable_every=None)
        stack.callback(session.abort)
        moe = RemoteMoE(client, LAYER, gate=gate(shape), session=session)

        def ours() -> None:
            _backward(moe, x, target)
            session.step()

        steps: dict[str, Step] = {"expertmesh": ours}
        local = LocalLayer(gate(shape), experts(shape, kind)).train()
        for parameter in local.experts.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(local.experts.parameters(), lr=RATE)
        for threads in (1, 2):
            steps[f"in process, {threads} threads"] = _in_process(local, optimizer, x, target, threads)
        hivemind = None
        if dtype == "fp32":
            try:
                hivemind = stack.enter_context(closing(Hivemind(experts=shape.experts, width=shape.width)))
            except ArmUnavailable as error:
                print(f"without hivemind: {error}", flush=True)
        for step in steps.values():
            step()
        for block in range(blocks):
            for name in turn(list(steps), block):
                found.setdefault(name, []).append(_seconds(steps[name]))
            if hivemind is not None:
                found.setdefault("hivemind", []).append(hivemind.block("training", ROWS, 1, 5.0)["p50"])
    return found


def _backward(moe: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> None:
    torch.autograd.backward(torch.nn.functional.mse_loss(moe(x).float(), target.float()))


def _in_process(layer: LocalLayer, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, threads: int) -> Step:
    def step() -> None:
        torch.set_num_threads(threads)
        _backward(layer, x, target)
        optimizer.step()
        optimizer.zero_grad()
        torch.set_num_threads(1)

    return step


def _seconds(step: Step) -> float:
    times = []
    for _ in range(2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _lines(dtype: str, seconds: dict[str, list[float]]) -> list[Line]:
    rates = {name: [ROWS / value for value in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    limit = max((name for name in rates if name.startswith("in process")), key=lambda name: medians[name])
    lines = []
    for other, bound in ((limit, 0.8), ("hivemind", 5.0)):
        if other in rates:
            pair = (medians["expertmesh"], medians[other])
            compared = ratio(rates["expertmesh"], rates[other])
            what = f"L {dtype}, {ROWS} rows, a step of training: rows/s, client and 2 actors"
            lines.append(against("C13", what, pair, other, compared, at_least(bound)))
    return lines

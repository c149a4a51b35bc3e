"""C10: most rows want one expert. A second replica of it, a quarter more in all, against balanced rows and none.

Experts compute, on one thread each, so that one of them cannot use the whole machine. Rows say by themselves which
expert they want: the gate looks at their first columns.

Shapes: T rows, D features, E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from benchmarks.chaos.load import Load, capacity
from benchmarks.compare import ratio, turn
from benchmarks.home import own_home
from benchmarks.peers.model import SHAPES

from expertmesh import Cluster, Expert, Layer, TensorSpec, gates

from .case import at_least
from .verdict import Line, against

EXPERTS, WIDTH = SHAPES["W"].experts, SHAPES["W"].width
HOT_SHARE = 0.75
COUNT, CALLERS, BATCHES = 256, 8, 8
"""Rows enough at each expert that its time follows their number, and not the reading of its weights."""

MADE = "benchmarks.peers.product_host:make"


def run(quick: bool) -> tuple[list[Line], dict[str, Any]]:
    """One round: its lines, and in the place of a timeline the rows/s of each block, by case."""
    blocks, seconds, warm = (3, 1.5, 0.5) if quick else (4, 1.5, 0.5)
    even = [1 / EXPERTS] * EXPERTS
    skewed = [HOT_SHARE, *([(1 - HOT_SHARE) / (EXPERTS - 1)] * (EXPERTS - 1))]
    cases = {"balanced": ("plain", inputs(even)), "none": ("plain", inputs(skewed)), "extra": ("more", inputs(skewed))}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    with own_home():
        layers = [layer("plain", 1), layer("more", 2)]
        with Cluster.start(layers, name="bench-skew", port=0, metrics_port=None, log_level="warning") as cluster:
            for block in range(blocks):
                for name in turn(list(cases), block):
                    asked, rows = cases[name]
                    load = Load(cluster.endpoint, asked, callers=CALLERS, count=COUNT, inputs=rows)
                    rates[name].append(capacity(load, seconds=seconds, warm=warm))
    return lines_of([rates]), {"rates": rates}


def lines_of(rounds: Sequence[Mapping[str, Sequence[float]]]) -> list[Line]:
    """Lines over rounds that lie minutes apart, from the rows/s of their blocks, by case."""
    rates = {name: [value for one in rounds for value in one[name]] for name in rounds[0]}
    numbers = [number for number, one in enumerate(rounds) for _ in one["extra"]]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    lines = []
    for base, bound in (("balanced", 0.90), ("none", 1.25)):
        what = f"rows/s, {100 * HOT_SHARE:.0f} % of rows to 1 of {EXPERTS} experts, 25 % more replicas, against {base}"
        found = ratio(rates["extra"], rates[base], rounds=numbers)
        lines.append(against("C10", what, (medians["extra"], medians[base]), base, found, at_least(bound)))
    return lines


def layer(name: str, replicas: int) -> Layer:
    """Experts that answer the rows that name them; the first has so many replicas."""
    gate = gates.TopK(WIDTH, EXPERTS, k=1)
    weight_ED = torch.zeros(EXPERTS, WIDTH)
    weight_ED[:, :EXPERTS] = torch.eye(EXPERTS)
    gate.load_state_dict({"weight": weight_ED})
    rows = TensorSpec((WIDTH,), "float32")
    experts = {
        f"e{index}": Expert(
            MADE, args=("W", index, "fp32"), replicas=replicas if index == 0 else 1, input=rows, output=rows
        )
        for index in range(EXPERTS)
    }
    return Layer(name, gate, experts, input=rows)


def inputs(shares: list[float]) -> list[Any]:
    """Batches of rows [T, D] that want the experts in these shares, and are the same each time."""
    random = np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        x_TD = random.standard_normal((COUNT, WIDTH)).astype(np.float32)
        x_TD[:, :EXPERTS] = 0
        x_TD[np.arange(COUNT), random.choice(EXPERTS, COUNT, p=shares)] = 1
        batches.append(x_TD)
    return batches

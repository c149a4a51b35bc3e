"""A cluster of the product: `python -m benchmarks.peers.product_host KIND SHAPE DTYPE COUNT TRANSPORT STALL ADDRESS`.

KIND is `layer`, with its experts on COUNT actors, or one expert in COUNT replicas: `identity` or `ffn`. It joins the
Ray at ADDRESS, or starts a private one if that is empty. Says where it serves, and stops when its standard input ends.
It is a process of its own because other arms have a Ray of theirs in the process that measures.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from expertmesh import Cluster, Expert, Layer, TensorSpec, gates

from .helper import speaking
from .model import DTYPES, SHAPES, expert, gate
from .ray_actors import packs

LAYER = "bench"


class Stalled(torch.nn.Module):
    """An expert that sleeps before it computes rows."""

    def __init__(self, module: torch.nn.Module, seconds: float) -> None:
        super().__init__()
        self.module, self._seconds = module, seconds

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Sleep, then compute."""
        time.sleep(self._seconds)
        return self.module(x_RD)  # type: ignore[no-any-return]


def make(shape: str, index: int, dtype: str, stall: float = 0.0) -> torch.nn.Module:
    """Expert `index` of a shape, as each actor builds it."""
    module = expert(SHAPES[shape], index, DTYPES[dtype]).requires_grad_(True)  # C13 trains it
    return Stalled(module, stall) if stall else module


MADE = f"{__package__}.product_host:make"


def layer(shape: str, dtype: str, actors: int, stall: float = 0.0) -> Layer:
    """The layer that all arms compute, with its experts on `actors` actors.

    The first expert of the last actor sleeps `stall` seconds for each message: most messages hold rows for it.
    """
    declared = {}
    together = packs(SHAPES[shape].experts, actors)
    for pack, indices in enumerate(together):
        for index in indices:
            seconds = stall if index == together[-1].start else 0.0
            name = f"pack{pack}" if len(indices) > 1 else None
            declared[f"e{index}"] = Expert(MADE, args=(shape, index, dtype, seconds), pack=name)
    return Layer(LAYER, gate=gate(SHAPES[shape]), experts=declared)


def single(kind: str, shape: str, dtype: str, replicas: int) -> Layer:
    """One expert that all rows go to, with weight 1."""
    rows = TensorSpec((SHAPES[shape].width,), str(DTYPES[dtype]).removeprefix("torch."))
    factory, arguments = ("torch.nn:Identity", ()) if kind == "identity" else (MADE, (shape, 0, dtype))
    one = Expert(factory, args=arguments, replicas=replicas, input=rows, output=rows)
    return Layer(LAYER, gates.Fixed([1.0]), {"e0": one}, input=rows)


def main(kind: str, shape: str, dtype: str, count: str, transport: str, stall: str, address: str) -> None:
    """Serve until standard input ends."""
    whole = kind == "layer"
    declared = layer(shape, dtype, int(count), float(stall)) if whole else single(kind, shape, dtype, int(count))
    options: dict[str, Any] = {"port": 0, "metrics_port": None, "transport": transport, "address": address or None}
    with speaking() as say, Cluster.start([declared], name=f"bench-{os.getpid()}", **options) as cluster:
        say({"endpoint": cluster.endpoint, "name": cluster.config.name})
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

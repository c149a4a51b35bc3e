"""A cluster of the product for the arms: `python -m benchmarks.peers.product_host SHAPE DTYPE ACTORS TRANSPORT STALL`.

Prints one JSON line when it serves, and stops when its standard input ends. It is a process of its own because other
arms have a Ray of theirs in the process that measures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

from expertmesh import Cluster, Expert, Layer

from .model import DTYPES, SHAPES, expert, gate
from .ray_good import packs

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
    module = expert(SHAPES[shape], index, DTYPES[dtype])
    return Stalled(module, stall) if stall else module


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
            arguments = (shape, index, dtype, seconds)
            declared[f"e{index}"] = Expert(f"{__package__}.product_host:make", args=arguments, pack=name)
    return Layer(LAYER, gate=gate(SHAPES[shape]), experts=declared)


def main(shape: str, dtype: str, actors: str, transport: str = "channel", stall: str = "0") -> None:
    """Serve until standard input ends."""
    said = os.dup(1)
    os.dup2(2, 1)  # Ray warns on standard output of many workers that start
    options = {"name": f"bench-{os.getpid()}", "port": 0, "metrics_port": None, "transport": transport}
    with Cluster.start([layer(shape, dtype, int(actors), float(stall))], **options) as cluster:
        os.write(said, f"{json.dumps(described(cluster))}\n".encode())
        sys.stdin.read()


def described(cluster: Cluster) -> dict[str, Any]:
    """What a router in another process must know to reach the replicas: the benchmark alone hands the secret out."""
    backend: Any = cluster._backend
    state = backend.state()
    channel = getattr(backend, "_channel", None)
    replicas = [
        {
            "id": replica.id,
            "experts": list(replica.experts),
            "incarnation": replica.incarnation,
            "holds": [list(held) for held in replica.holds],
            "state": replica.state,
            "pid": replica.pid,
            "address": replica.address,
        }
        for replica in state.replicas
    ]
    secret = channel.secret.hex() if channel is not None else ""
    return {"endpoint": cluster.endpoint, "secret": secret, "versions": dict(state.versions), "replicas": replicas}


if __name__ == "__main__":
    main(*sys.argv[1:])

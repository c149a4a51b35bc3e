"""A cluster of the product for the arms: `python -m benchmarks.peers.product_host SHAPE DTYPE ACTORS TRANSPORT`.

Prints one JSON line when it serves, and stops when its standard input ends. It is a process of its own because other
arms have a Ray of theirs in the process that measures.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from expertmesh import Cluster, Expert, Layer

from .model import DTYPES, SHAPES, expert, gate
from .ray_good import packs

LAYER = "bench"


def make(shape: str, index: int, dtype: str) -> torch.nn.Module:
    """Expert `index` of a shape, as each actor builds it."""
    return expert(SHAPES[shape], index, DTYPES[dtype])


def layer(shape: str, dtype: str, actors: int) -> Layer:
    """The layer that all arms compute, with its experts on `actors` actors."""
    declared = {}
    for pack, indices in enumerate(packs(SHAPES[shape].experts, actors)):
        for index in indices:
            name = f"pack{pack}" if len(indices) > 1 else None
            declared[f"e{index}"] = Expert(f"{__package__}.product_host:make", args=(shape, index, dtype), pack=name)
    return Layer(LAYER, gate=gate(SHAPES[shape]), experts=declared)


def main(shape: str, dtype: str, actors: str, transport: str = "channel") -> None:
    """Serve until standard input ends."""
    said = os.dup(1)
    os.dup2(2, 1)  # Ray warns on standard output of many workers that start
    options = {"name": f"bench-{shape}-{dtype}-{transport}", "port": 0, "transport": transport}
    with Cluster.start([layer(shape, dtype, int(actors))], **options) as cluster:
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

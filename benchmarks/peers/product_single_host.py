"""A cluster of one expert: `python -m benchmarks.peers.product_single_host KIND SHAPE DTYPE TRANSPORT REPLICAS`.

KIND is `identity` or `ffn`. Prints one JSON line when it serves, and stops when its standard input ends.
"""

from __future__ import annotations

import json
import os
import sys

from expertmesh import Cluster, Expert, Layer, TensorSpec, gates

from .model import DTYPES, SHAPES

LAYER = "single"


def layer(kind: str, shape: str, dtype: str, replicas: int) -> Layer:
    """One expert that all rows go to, with weight 1."""
    name = str(DTYPES[dtype]).removeprefix("torch.")
    rows = TensorSpec((SHAPES[shape].width,), name)
    if kind == "identity":
        expert = Expert("torch.nn:Identity", replicas=replicas, input=rows, output=rows)
    else:
        made = f"{__package__}.product_host:make"
        expert = Expert(made, args=(shape, 0, dtype), replicas=replicas, input=rows, output=rows)
    return Layer(LAYER, gates.Fixed([1.0]), {"e0": expert}, input=rows)


def main(kind: str, shape: str, dtype: str, transport: str, replicas: str) -> None:
    """Serve until standard input ends."""
    options = {"name": f"bench-{os.getpid()}", "port": 0, "metrics_port": None, "transport": transport}
    with Cluster.start([layer(kind, shape, dtype, int(replicas))], **options) as cluster:
        print(json.dumps({"endpoint": cluster.endpoint}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

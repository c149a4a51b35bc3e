"""The channel between nodes beside the channel on a node: two Ray nodes on this machine, joined by TCP.

    python -m benchmarks.nodes [--rows 512] [--width 1024] [--seconds 3]

The same identity expert runs on either node behind a layer of its own; calls alternate in blocks, answers are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from benchmarks.compare import interleaved, ratio
from benchmarks.home import own_home

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.cluster.runtime.ray_environment import load_backend


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a Ray of two nodes, with the resources "first" and "second"."""
    load_backend(None)
    import ray  # after its environment was set
    from ray.cluster_utils import Cluster as RayCluster

    head = {"num_cpus": 2, "include_dashboard": False, "resources": {"first": 1}}
    nodes: Any = RayCluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1, resources={"second": 1})
    try:
        yield nodes.address
    finally:
        ray.shutdown()
        nodes.shutdown()


def main() -> None:
    """Print rows a second of both ways, and the ratio."""
    options = _options()
    layers = [
        Layer("here", gates.Fixed([1.0]), {"e": Expert("torch:clone", resources={"first": 1})}),
        Layer("there", gates.Fixed([1.0]), {"e": Expert("torch:clone", resources={"second": 1})}),
    ]
    x = np.random.default_rng(0).standard_normal((options.rows, options.width), dtype=np.float32)
    with (
        own_home(),
        two_nodes() as address,
        Cluster.start(layers, name="bench-nodes", port=0, address=address) as cluster,
        Client(cluster.endpoint) as client,
    ):
        for layer in ("here", "there"):
            np.testing.assert_array_equal(client.forward(layer, x), x)
        begin = time.perf_counter()
        functions = {layer: (lambda layer=layer: client.forward(layer, x)) for layer in ("here", "there")}
        times = interleaved(functions, blocks=max(7, int(options.seconds / 0.1)))
        carried = client.status()["router"]["rows_carried"]
    for layer, way in (("here", "unix"), ("there", "tcp")):
        median = statistics.median(times[layer])
        print(f"{way:5} {options.rows} rows of {options.width} float32: {1000 * median:.2f} ms a call, "
              f"{options.rows / median:,.0f} rows/s, {carried[way]:,} rows carried")  # fmt: skip
    print(f"time over TCP / on the node: {ratio(times['there'], times['here'])} ({time.perf_counter() - begin:.0f} s)")


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long to measure")
    return parser.parse_args()


if __name__ == "__main__":
    main()

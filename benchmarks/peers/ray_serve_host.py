"""The owner of a Ray Serve application: `python -m benchmarks.peers.ray_serve_host SHAPE DTYPE [batched]`.

Says where its ingress listens, and ends with its standard input. Serve's flags come from the environment.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client

from expertmesh.cluster.machine.ports import free_port

from .helper import speaking
from .model import DTYPES, SHAPES
from .private_ray import private_ray
from .ray_serve_app import add_to_server, application

HOST = "127.0.0.1"
START_SECONDS = 120.0


def main(shape: str, dtype: str, *batched: str) -> None:
    """Serve until standard input ends."""
    servicer = f"{add_to_server.__module__}.{add_to_server.__name__}"
    with speaking() as say, private_ray():
        serve.start(
            http_options=HTTPOptions(host=HOST, port=free_port(HOST)),
            grpc_options=gRPCOptions(port=free_port(HOST), grpc_servicer_functions=[servicer]),
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        serve.run(application(SHAPES[shape], DTYPES[dtype], bool(batched)), name="layer")
        say({"version": f"ray {ray.__version__}", **addresses()})
        sys.stdin.read()


def addresses() -> dict[str, str]:
    """{protocol: address} where the ingress listens: the proxy, or under direct ingress the router itself."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        client: Any = _get_global_client()
        groups = client.get_serve_details()["target_groups"]
        found = {group["protocol"]: group["targets"] for group in groups if group["targets"]}
        if {"HTTP", "gRPC"} <= found.keys():
            return {name.lower(): f"{HOST}:{targets[0]['port']}" for name, targets in found.items()}
        time.sleep(0.1)
    raise TimeoutError(f"the ingress of Serve did not open its ports within {START_SECONDS:g} s")


if __name__ == "__main__":
    main(*sys.argv[1:])

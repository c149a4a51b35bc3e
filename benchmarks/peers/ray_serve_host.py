"""The owner of a Ray Serve application: `python -m benchmarks.peers.ray_serve_host SHAPE DTYPE [batched]`.

Prints where its ingress listens, as JSON, and ends with its standard input. Serve's flags come from the environment.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client

from .model import DTYPES, SHAPES, Shape
from .private_ray import private_ray
from .ray_serve_app import add_to_server, application

HOST = "127.0.0.1"
START_SECONDS = 120.0


def main() -> None:
    """Serve until standard input ends."""
    shape, dtype = SHAPES[sys.argv[1]], DTYPES[sys.argv[2]]
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Serve writes its log there
    with private_ray(), os.fdopen(answer, "w", encoding="utf-8") as told:
        start(shape, dtype, batched="batched" in sys.argv[3:])
        print(json.dumps({"version": f"ray {ray.__version__}", **addresses()}), file=told, flush=True)
        sys.stdin.read()


def start(shape: Shape, dtype: Any, *, batched: bool) -> Any:
    """Run the application on the Ray of this process; returns the handle of its router."""
    servicer = f"{add_to_server.__module__}.{add_to_server.__name__}"
    serve.start(
        http_options=HTTPOptions(host=HOST, port=_free_port()),
        grpc_options=gRPCOptions(port=_free_port(), grpc_servicer_functions=[servicer]),
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    return serve.run(application(shape, dtype, batched), name="layer")


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

"""Every arm by its name. A module is imported when its arm is asked for: some read the environment when imported."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .arm import Arm
from .model import Shape


@dataclass(frozen=True)
class Entry:
    """Where an arm is defined, and with what options."""

    module: str
    attribute: str
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS = {
    "in_process": Entry("in_process", "InProcess"),
    "expertmesh": Entry("product", "ProductRouter"),
    "expertmesh_1": Entry("product", "ProductRouter", {"actors": 1}),
    "expertmesh_2": Entry("product", "ProductRouter", {"actors": 2}),
    "expertmesh_4": Entry("product", "ProductRouter", {"actors": 4}),
    "expertmesh_2_stalled": Entry("product", "ProductRouter", {"actors": 2, "stall": 0.05}),
    "expertmesh_client": Entry("product", "ProductClient"),
    "expertmesh_client_2": Entry("product", "ProductClient", {"actors": 2}),
    "expertmesh_over_ray": Entry("product", "ProductClient", {"transport": "ray"}),
    "identity": Entry("product_single", "Identity"),
    "identity_actor": Entry("product_single", "Identity", {"transport": "channel"}),
    "ffn": Entry("product_single", "OneExpert"),
    "ffn_in_process": Entry("in_process", "OneExpertInProcess"),
    "ray_naive": Entry("ray_naive", "RayNaive"),
    "ray_good": Entry("ray_good", "RayGood"),
    "ray_good_1": Entry("ray_good", "RayGood", {"actors": 1}),
    "ray_good_2": Entry("ray_good", "RayGood", {"actors": 2}),
    "ray_serve": Entry("ray_serve", "RayServeIngress", {"protocol": "grpc"}),
    "ray_serve_optimised": Entry("ray_serve", "RayServeIngress", {"optimised": True}),
    "ray_serve_batched": Entry("ray_serve", "RayServeIngress", {"optimised": True, "batched": True}),
    "ray_serve_grpc": Entry("ray_serve", "RayServeIngress", {"optimised": True, "protocol": "grpc"}),
    "ray_serve_handle": Entry("ray_serve", "RayServeHandle"),
    "ray_serve_handle_optimised": Entry("ray_serve", "RayServeHandle", {"optimised": True}),
    "ray_serve_handle_batched": Entry("ray_serve", "RayServeHandle", {"optimised": True, "batched": True}),
    "gloo": Entry("gloo", "Gloo"),
    "gloo_stalled": Entry("gloo", "Gloo", {"stall": 0.05}),
    "grpc_echo": Entry("grpc_echo", "GrpcEcho"),
    "grpc_echo_stream": Entry("grpc_echo", "GrpcEcho", {"streaming": True}),
}


def start(name: str, shape: Shape, dtype: torch.dtype) -> Arm:
    """A running arm. Raises ArmUnavailable, with the reason, where it cannot run."""
    entry = ARMS[name]
    module = importlib.import_module(f"{__package__}.{entry.module}")
    arm: Arm = getattr(module, entry.attribute)(shape, dtype, **entry.options)
    return arm

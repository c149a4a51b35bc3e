"""Every arm by its name. A module is imported when its arm is asked for: some read the environment when imported."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .arm import Arm
from .model import Shape

ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "in_process": ("in_process", "InProcess", {}),
    "expertmesh": ("product", "ProductRouter", {}),
    "expertmesh_1": ("product", "ProductRouter", {"actors": 1}),
    "expertmesh_2": ("product", "ProductRouter", {"actors": 2}),
    "expertmesh_4": ("product", "ProductRouter", {"actors": 4}),
    "expertmesh_2_stalled": ("product", "ProductRouter", {"actors": 2, "stall": 0.05}),
    "expertmesh_client": ("product", "ProductClient", {}),
    "expertmesh_client_2": ("product", "ProductClient", {"actors": 2}),
    "identity": ("product", "Identity", {"actors": 1}),
    "identity_actor": ("product", "IdentityActor", {"actors": 1}),
    "ffn": ("product", "OneExpert", {"actors": 2}),
    "ffn_in_process": ("in_process", "OneExpertInProcess", {}),
    "ray_naive": ("ray_actors", "RayNaive", {}),
    "ray_good": ("ray_actors", "RayGood", {}),
    "ray_good_1": ("ray_actors", "RayGood", {"actors": 1}),
    "ray_good_2": ("ray_actors", "RayGood", {"actors": 2}),
    "ray_serve": ("ray_serve", "RayServe", {"protocol": "grpc"}),
    "ray_serve_optimised": ("ray_serve", "RayServe", {"optimised": True}),
    "ray_serve_batched": ("ray_serve", "RayServe", {"optimised": True, "batched": True}),
    "ray_serve_grpc": ("ray_serve", "RayServe", {"optimised": True, "protocol": "grpc"}),
    "gloo": ("gloo", "Gloo", {}),
    "gloo_stalled": ("gloo", "Gloo", {"stall": 0.05}),
    "grpc_echo": ("grpc_echo", "GrpcEcho", {}),
    "grpc_echo_stream": ("grpc_echo", "GrpcEcho", {"streaming": True}),
}
"""{arm: (module, class, options)}."""


def start(name: str, shape: Shape, dtype: torch.dtype) -> Arm:
    """A running arm. Raises ArmUnavailable, with the reason, where it cannot run."""
    module, arm, options = ARMS[name]
    started: Arm = getattr(importlib.import_module(f"{__package__}.{module}"), arm)(shape, dtype, **options)
    return started

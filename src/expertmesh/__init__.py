"""expertmesh: any set of experts as one live sparse layer, y = sum of w_i * f_i(x), spread over machines by Ray.

Every public name is loaded when it is first asked for: a process that only calls a cluster loads neither ray nor torch.
A name whose extra is not installed raises MissingExtra, which says how to install it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .experts import errors
from .experts.errors import (
    Aborted,
    ConfigError,
    DataLoss,
    DeadlineExceeded,
    ExpertFailed,
    ExpertMeshError,
    FailedPrecondition,
    Fenced,
    InvalidRequest,
    MissingExtra,
    NotFound,
    Overloaded,
    PermissionDenied,
    RouterUnavailable,
    SpecMismatch,
    TooLarge,
    Unauthenticated,
    Unavailable,
    VersionGone,
)
from .experts.optional_imports import load
from .experts.package_version import version

if TYPE_CHECKING:
    from .cluster.attach.attach import attach
    from .cluster.attach.router import AttachedRouter
    from .cluster.client.client import AsyncClient, Client
    from .cluster.client.reply import Reply
    from .cluster.config.loader import ClusterConfig
    from .cluster.owner.cluster import Cluster
    from .cluster.rpc.swaps import Lease, SwapOutcome
    from .cluster.torch_client.remote_moe import RemoteMoE
    from .experts.spec import Autoscale, Expert, TensorSpec
    from .router import gates
    from .router.mixture.layer import Layer

    __version__: str

_MODULES = {
    "AsyncClient": "cluster.client.client",
    "AttachedRouter": "cluster.attach.router",
    "Autoscale": "experts.spec",
    "Client": "cluster.client.client",
    "Cluster": "cluster.owner.cluster",
    "ClusterConfig": "cluster.config.loader",
    "Expert": "experts.spec",
    "Layer": "router.mixture.layer",
    "Lease": "cluster.rpc.swaps",
    "RemoteMoE": "cluster.torch_client.remote_moe",
    "Reply": "cluster.client.reply",
    "SwapOutcome": "cluster.rpc.swaps",
    "TensorSpec": "experts.spec",
    "attach": "cluster.attach.attach",
    "gates": "router.gates",
}

__all__ = [
    "Aborted",
    "AsyncClient",
    "AttachedRouter",
    "Autoscale",
    "Client",
    "Cluster",
    "ClusterConfig",
    "ConfigError",
    "DataLoss",
    "DeadlineExceeded",
    "Expert",
    "ExpertFailed",
    "ExpertMeshError",
    "FailedPrecondition",
    "Fenced",
    "InvalidRequest",
    "Layer",
    "Lease",
    "MissingExtra",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "RemoteMoE",
    "Reply",
    "RouterUnavailable",
    "SpecMismatch",
    "SwapOutcome",
    "TensorSpec",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "VersionGone",
    "__version__",
    "attach",
    "errors",
    "gates",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = load(f"{__name__}.{_MODULES[name]}", f"{__name__}.{name}")
    return module if name == "gates" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""What a cluster stands on: Ray, or this process alone, behind one interface."""

from __future__ import annotations

from typing import Any, Protocol

from ..router.replicas import Replica
from .controller import Desired, RouterReport
from .local_backend import LocalBackend
from .logs import log_file
from .plan import PlannedReplica
from .ray_environment import load_backend
from .service import ServiceSettings
from .settings import ClusterConfig


class Backend(Protocol):
    """Starts and ends the processes of a cluster."""

    temp_dir: str | None

    def start(self, address: str | None) -> None:
        """Make the ground ready. Raises FailedPrecondition or ConfigError."""

    def gpus(self) -> float:
        """How many GPUs there are."""

    def start_front(self, settings: ServiceSettings, timeout: float) -> tuple[int, int | None]:
        """Start router and controller; returns the ports of the gateway and of the metrics page."""

    def start_replica(self, planned: PlannedReplica) -> None:
        """Start a replica."""

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """Wait for a replica's report. Raises Unavailable at `deadline` (monotonic seconds)."""

    def stop_replica(self, replica_id: str) -> None:
        """End a replica for good."""

    def handles(self) -> dict[str, Any]:
        """How the transport reaches each replica."""

    def apply(self, desired: Desired) -> None:
        """Tell the controller what is to be; returns when the router knows."""

    def state(self) -> tuple[int, tuple[Replica, ...], RouterReport | None]:
        """The controller's revision, the replicas as it knows them, and the router's last report."""

    def stop(self, grace: float) -> None:
        """End everything; idempotent."""


def open_backend(config: ClusterConfig) -> Backend:
    """The backend that a configuration asks for. Imports Ray only where it is needed."""
    path = log_file(config.name)
    if config.transport == "local":
        return LocalBackend(config.log_level, path)
    module = load_backend(config.address)
    backend: Backend = module.RayBackend(config.log_level, path, config.runtime_env)
    return backend

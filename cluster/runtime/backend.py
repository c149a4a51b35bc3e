"""What a cluster stands on: Ray, or this process alone, behind one interface."""

from __future__ import annotations

from typing import Any, Protocol

from ...router.fanout.replica_view import Replica
from ..config.cluster_config import ClusterConfig
from ..control.messages import Desired
from ..control.ports import ControllerState, StateSettings
from ..machine.logs import log_file
from ..placement.plan import PlannedReplica
from .local_backend import LocalBackend
from .ray_environment import load_backend
from .router_process import ServiceSettings


class Backend(Protocol):
    """Starts and ends the processes of a cluster."""

    temp_dir: str | None

    def start(self, address: str | None) -> None:
        """Make the ground ready. Raises FailedPrecondition or ConfigError."""

    def gpus(self) -> float:
        """How many GPUs there are."""

    def start_front(self, settings: ServiceSettings, state: StateSettings, timeout: float) -> tuple[int, int | None]:
        """Start router and controller; returns the ports of the gateway and of the metrics page."""

    def start_replica(self, planned: PlannedReplica) -> None:
        """Start a replica."""

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """Wait for a replica's report. Raises Unavailable at `deadline` (monotonic seconds)."""

    def handles(self) -> dict[str, Any]:
        """How the transport reaches each replica."""

    def declare(self, desired: Desired, timeout: float) -> dict[str, str]:
        """Have the controller bring everything to what is declared; returns the versions that then serve."""

    def state(self) -> ControllerState:
        """What the controller knows."""

    def stop(self, grace: float) -> None:
        """End everything; idempotent."""


def open_backend(config: ClusterConfig) -> Backend:
    """The backend that a configuration asks for. Imports Ray only where it is needed."""
    path = log_file(config.name)
    if config.transport == "local":
        return LocalBackend(config.log_level, path)
    module = load_backend(config.address)
    backend: Backend = module.RayBackend(
        config.log_level, path, config.runtime_env, direct=config.transport == "channel"
    )
    return backend

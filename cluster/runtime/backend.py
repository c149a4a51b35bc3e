"""The backend that runs a cluster's processes: Ray, or this process alone, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ...router.fanout.replica_view import Replica
from ..config.cluster_config import ClusterConfig
from ..control.messages import Desired
from ..control.ports import ControllerState, StateSettings
from ..control.routers.mailbox import Letter
from ..machine.logs import log_file
from ..machine.ports import is_loopback
from ..placement.capacity import Resources
from ..placement.plan import PlannedReplica
from .local_backend import LocalBackend
from .places import Place
from .ray_environment import load_backend
from .router_process import ServiceSettings


class Backend(Protocol):
    """Starts and stops the processes of a cluster."""

    temp_dir: str | None

    def start(self, address: str | None, timeout: float) -> None:
        """Prepare the backend; `timeout` bounds joining a Ray, in seconds. Raises FailedPrecondition or ConfigError."""

    def ray(self) -> dict[str, str]:
        """Where its Ray and its controller are, as fields of the run file; empty in one process."""

    def lost(self) -> str | None:
        """Why the processes of the cluster will not serve any more, or None."""

    def nodes(self) -> list[Resources] | None:
        """What each node has to reserve; None where nothing is reserved."""

    def start_front(self, routers: Mapping[str, ServiceSettings], state: StateSettings, timeout: float) -> list[Place]:
        """Start the routers, each with its settings by name, and the controller; returns where they listen."""

    def start_replica(self, planned: PlannedReplica) -> None:
        """Start a replica."""

    def stop_replica(self, replica_id: str) -> None:
        """End a replica, which nobody uses any more; idempotent."""

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """Wait for a replica's report. Raises Unavailable at `deadline` (monotonic seconds)."""

    def handles(self) -> dict[str, Any]:
        """A handle of each replica for the transport, by id."""

    def routers(self) -> dict[str, Any]:
        """A handle of each router for the controller, by name."""

    def declare(self, desired: Desired, timeout: float) -> dict[str, str]:
        """Have the controller load the declared layers; returns the versions that then serve."""

    def changes(self, answers: Mapping[int, Any]) -> tuple[Letter, ...]:
        """Answer what was asked of the owner, by number; returns what has no answer yet. Raises Unavailable."""

    def state(self) -> ControllerState:
        """The state of the controller."""

    def stop(self, grace: float) -> None:
        """Stop everything; idempotent."""


def open_backend(config: ClusterConfig) -> Backend:
    """The backend for a configuration. Imports Ray only if needed."""
    path = log_file(config.name)
    if config.transport == "local":
        return LocalBackend(config.log_level, path)
    module = load_backend(config.address)
    backend: Backend = module.RayBackend(
        config.log_level,
        path,
        config.runtime_env,
        direct=config.transport == "channel",
        spread=config.routers > 1 and not is_loopback(config.host),
        hang_seconds=config.hang_seconds,
    )
    return backend

"""The way of a router in a caller's process to a cluster on Ray: join its Ray, find its controller, speak to it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import ray

from ...experts.errors import FailedPrecondition, NotFound
from ..control.messages import Desired
from ..control.routers.mailbox import Letter
from .ray_actors import NAMESPACE, node
from .ray_backend import QUIET
from .ray_environment import reachable, within
from .ray_ports import RayControlPort, awaited, fetched
from .ray_transport import Actors
from .router_process import Welcome

ANSWER_SECONDS = 10.0


class RayConnection:
    """A connection to a cluster: what a router in this process needs of it."""

    def __init__(self, name: str, controller: Any, welcome: Welcome, *, joined: bool) -> None:
        self.name = name
        self.settings = welcome.settings
        self.seat = RaySeat(controller)
        self.control = RayControlPort()
        self.control.handle = controller
        self._actors = Actors(welcome.channel, node())
        self.transport = self._actors.transport
        self.where = {"node": node()}
        self._joined = joined

    def declared(self, desired: Desired) -> None:
        """Take the actors of the replicas."""
        self._actors.declared(desired.handles)

    def close(self) -> None:
        """Leave Ray, if it was joined for this; idempotent."""
        if self._joined:
            self._joined = False
            ray.shutdown()


class RaySeat:
    """Calls the controller for a router that it cannot call."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    async def join(self, name: str, fresh: bool) -> str:
        """Become a member."""
        return await awaited(self._controller.attach.remote(name, fresh), ANSWER_SECONDS)

    async def fetch(
        self, name: str, box: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        """Hand over answers and wait for orders."""
        polled = self._controller.fetch.remote(name, box, dict(answers), list(held), seconds)
        return await awaited(polled, seconds + ANSWER_SECONDS)

    async def leave(self, name: str) -> None:
        """Be a member no longer."""
        await awaited(self._controller.detach.remote(name), ANSWER_SECONDS)


def connect(name: str, address: str, cluster: str | None, actor: str | None, timeout: float) -> RayConnection:
    """Join the Ray at `address` and find the controller `actor` of a cluster, or the only one of that name.

    `name` is that of the router. Raises FailedPrecondition where this process uses another Ray, or there is none,
    NotFound without such a cluster, and Unavailable for a controller that does not answer within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    joined = _join(address, timeout)
    try:
        controller = _controller(cluster, actor, address)
        welcome: Welcome = fetched(controller.welcome.remote(), max(1.0, deadline - time.monotonic()))
        return RayConnection(name, controller, welcome, joined=joined)
    except BaseException:
        if joined:
            ray.shutdown()
        raise


def _join(address: str, timeout: float) -> bool:
    """Join a Ray; returns False if this process uses it already. Raises FailedPrecondition if it uses another."""
    if ray.is_initialized():
        used = ray.get_runtime_context().gcs_address
        if used != address:
            raise FailedPrecondition(
                f"this process uses the Ray at {used}, and the cluster is on that at {address}: attach from another "
                "process, or call ray.shutdown() before"
            )
        return False
    deadline = time.monotonic() + timeout
    host, port = reachable(address, timeout)
    try:
        within(max(1.0, deadline - time.monotonic()), lambda: ray.init(address=f"{host}:{port}", **QUIET))
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise FailedPrecondition(f"the Ray at {address} could not be joined: {error}") from error
    return True


def _controller(cluster: str | None, actor: str | None, address: str) -> Any:
    """The controller of a cluster, by the name of its actor or of the cluster, or of the only one.

    Raises NotFound, or FailedPrecondition if there are several.
    """
    found = [actor] if actor is not None else _controllers(cluster)
    which = "cluster" if cluster is None else f"cluster {cluster!r}"
    if len(found) > 1:
        raise FailedPrecondition(
            f"the Ray at {address} runs {', '.join(found)}: pass name=, or attach by name on the machine of the one "
            "that you mean"
        )
    try:
        return ray.get_actor(found[0] if found else "none", namespace=NAMESPACE)
    except ValueError:
        raise NotFound(f"the Ray at {address} runs no {which}") from None


def _controllers(cluster: str | None) -> list[str]:
    """The names of the actors of controllers that run on this Ray."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)
    return [name for name in names if cluster is None or name.rpartition("/")[0] == cluster]

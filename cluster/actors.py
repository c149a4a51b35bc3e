"""The Ray shells: expert, router and controller actors, and the transport that carries rows through Ray's calls.

Each class here only wraps an object that knows no Ray. Health and control calls have a concurrency group of their own,
so that a long computation does not delay them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from torch import Tensor

from ..experts.errors import ExpertMeshError, Unavailable
from ..experts.host import ExpertHost
from ..experts.protocol import ExpertCall, ExpertReply, Part, PartFailure
from ..experts.spec import Expert
from ..experts.tensors import byte_view, dtype_name, from_bytes
from ..router.replicas import READY, Replica
from .controller import Controller, Desired, RouterReport
from .logs import configure_logs
from .service import RouterService, ServiceSettings

Packed = tuple[np.ndarray[Any, Any], str, tuple[int, ...]]
"""A tensor as Ray carries it without a copy: its bytes, its dtype's name, its shape."""


@dataclass(frozen=True)
class LogSettings:
    """Where the processes of a cluster log to, and from which level on."""

    level: str
    path: str | None


class ExpertActor:
    """Runs one replica: one expert, or the experts of a pack, on the device that Ray assigned."""

    def __init__(self, replica_id: str, experts: Mapping[str, tuple[Expert, int]], logs: LogSettings) -> None:
        configure_logs(replica_id, logs.level, logs.path)
        torch.set_num_threads(1)
        wants_gpu = any(expert.num_gpus for expert, _ in experts.values())
        self._host = ExpertHost("cuda" if wants_gpu else "cpu")
        self._id = replica_id
        self._names = tuple(experts)
        self._problem: ExpertMeshError | None = None
        try:
            for expert_id, (expert, counter) in experts.items():
                self._host.load(expert_id, expert, counter)
        except ExpertMeshError as error:
            self._problem = error

    @ray.method(concurrency_group="compute")
    def compute(self, attempt: str, parts: tuple[Part, ...], rows: Packed, index: Packed) -> Any:
        """Compute one message."""
        reply = self._host.compute(ExpertCall(attempt, parts, unpack(rows), unpack(index)))
        return reply.incarnation, [out if isinstance(out, PartFailure) else pack(out) for out in reply.outputs]

    @ray.method(concurrency_group="control")
    def report(self) -> Replica:
        """What this replica is and holds."""
        return Replica(
            id=self._id,
            experts=self._names,
            incarnation=self._host.incarnation,
            holds=frozenset((loaded.expert, loaded.version) for loaded in self._host.loaded()),
            state=READY if self._problem is None else "failed",
            node=_node(),
            pid=os.getpid(),
            device=_device_name(self._host.device),
            problem="" if self._problem is None else self._problem.message,
        )


class RouterActor:
    """Runs the router's process: gateway, router, metrics."""

    def __init__(self, settings: ServiceSettings, logs: LogSettings) -> None:
        configure_logs("router", logs.level, logs.path)
        torch.set_num_threads(1)
        self._transport = RayTransport()
        self._service = RouterService(settings, self._transport)
        self._ports: tuple[int, int | None] | None = None

    async def start(self) -> tuple[int, int | None]:
        """Listen, once; returns the ports of the gateway and of the metrics page."""
        if self._ports is None:
            self._ports = await self._service.start()
        return self._ports

    async def apply(self, desired: Desired) -> None:
        """Take a newer state of things."""
        self._transport.handles = dict(desired.handles)
        self._service.apply(desired)

    async def sync(self, replicas: tuple[Replica, ...]) -> RouterReport:
        """Take a report of all replicas; a router that Ray restarted begins to listen here."""
        await self.start()
        return self._service.sync(replicas)

    async def stop(self, grace: float) -> None:
        """Drain and close the port."""
        await self._service.stop(grace)


class ControllerActor:
    """Runs the controller and its endless turns."""

    def __init__(self, logs: LogSettings) -> None:
        configure_logs("controller", logs.level, logs.path)
        self._router = RayRouterPort()
        self._controller = Controller(self._router, RayProbePort())
        self._turns: asyncio.Task[None] | None = None

    async def apply(self, router: Any, desired: Desired) -> None:
        """Take a newer state of things, and bring the router there.

        The router comes with every call and not with the constructor, whose arguments Ray may lose before a restart.
        """
        self._router.handle = router
        self._run()
        await self._controller.apply(desired)

    async def state(self) -> tuple[int, tuple[Replica, ...], RouterReport | None]:
        """The revision that is known here, the replicas, and the router's last report."""
        self._run()
        controller = self._controller
        return controller.desired.revision, controller.replicas(), controller.report

    def _run(self) -> None:
        if self._turns is None:
            self._turns = asyncio.get_running_loop().create_task(self._controller.run())


class RayRouterPort:
    """Reaches the router actor."""

    handle: Any = None

    async def apply(self, desired: Desired) -> None:
        """Hand over a new state of things."""
        await awaited(self.handle.apply.remote(desired))

    async def sync(self, replicas: tuple[Replica, ...]) -> RouterReport:
        """Hand over a report of the replicas."""
        report: RouterReport = await awaited(self.handle.sync.remote(replicas))
        return report


class RayProbePort:
    """Reaches the replicas' control group."""

    async def probe(self, replica_id: str, handle: Any) -> Replica:
        """Ask for a report."""
        if handle is None:
            raise Unavailable(f"replica {replica_id} has no actor yet")
        report: Replica = await awaited(handle.report.remote())
        return report


class RayTransport:
    """Carries messages through Ray's actor calls: portable, and the baseline of the direct channel."""

    def __init__(self) -> None:
        self.handles: dict[str, Any] = {}

    async def send(self, replica_id: str, call: ExpertCall) -> ExpertReply:
        """Call the actor. Raises Unavailable when it is not there or dies before it answers."""
        handle = self.handles.get(replica_id)
        if handle is None:
            raise Unavailable("the replica is gone; retry")
        answer = await awaited(handle.compute.remote(call.attempt, call.parts, pack(call.rows), pack(call.row_index)))
        incarnation, outputs = answer
        return ExpertReply(incarnation, tuple(out if isinstance(out, PartFailure) else unpack(out) for out in outputs))


async def awaited(reference: Any) -> Any:
    """Await a Ray reference; the one border at which Ray's exceptions become ours."""
    try:
        return await reference
    except RayError as error:
        raise translated(error) from error


def fetched(reference: Any, timeout: float) -> Any:
    """Like `awaited`, for a caller that blocks, at most `timeout` seconds."""
    try:
        return ray.get(reference, timeout=timeout)
    except RayError as error:
        raise translated(error) from error


def translated(error: RayError) -> ExpertMeshError:
    """What a Ray exception means here."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, ExpertMeshError) else ExpertMeshError(f"an actor raised: {cause!r}")
    if isinstance(error, GetTimeoutError):
        return Unavailable("an actor did not answer in time; it may be starting or busy")
    if isinstance(error, RayActorError):
        return Unavailable("the actor died or is restarting; retry")
    return Unavailable(f"Ray could not carry the call ({type(error).__name__}); retry")


def pack(tensor: Tensor) -> Packed:
    """A tensor in the form that Ray carries without a copy."""
    return byte_view(tensor), dtype_name(tensor.dtype), tuple(tensor.shape)


def unpack(packed: Packed) -> Tensor:
    """The tensor of `pack`, sharing its memory."""
    return from_bytes(*packed)


def _node() -> str:
    """This node: its address, and the beginning of Ray's id for it."""
    return f"{ray.util.get_node_ip_address()}/{ray.get_runtime_context().get_node_id()[:8]}"  # type: ignore[no-untyped-call]


def _device_name(device: str) -> str:
    return f"cuda:{torch.cuda.get_device_name()}" if device == "cuda" else device

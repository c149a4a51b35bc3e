"""Clusters of this process for an attached router: hosts and a few orders, or a whole local cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.router_in_process import RouterInProcess
from helpers.swap_cluster import SwapCluster

from expertmesh.cluster.attach.engine import Engine
from expertmesh.cluster.attach.router import AttachedRouter
from expertmesh.cluster.control.controller import Controller
from expertmesh.cluster.control.messages import (
    Candidate,
    Desired,
    RouterReport,
    RouterUpdate,
    SwapRequest,
    SwapResult,
)
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.control.routers.attached import AllRouters, AttachedRouters
from expertmesh.cluster.control.routers.follow import Routers
from expertmesh.cluster.control.routers.mailbox import Letter, Mailbox
from expertmesh.cluster.gateway.gateway import GatewaySettings
from expertmesh.cluster.runtime.router_process import ServiceSettings
from expertmesh.cluster.runtime.router_thread import elsewhere
from expertmesh.experts.errors import NotFound, Unavailable
from expertmesh.router.fanout.transport import LocalTransport
from expertmesh.router.mixture.layer import Layer


class Home:
    """A `Connection` to hosts of this process, and the `Seat` of its controller, on the loop of the attached router.

    `members` are the names that have joined and not left.
    """

    name = "attached-test"
    where: Mapping[str, str] = {"node": "here"}

    def __init__(self, layer: Layer, folder: Path, **settings: Any) -> None:
        self.mesh = RouterInProcess(layer)
        self.transport: Any = self.mesh.local
        self.control: Any = self
        self.seat = self
        limits = {"max_rows_in_flight": 65_536, "gateway": GatewaySettings()} | settings
        self.settings = ServiceSettings(name="test", metrics_port=None, tokens=(), state_dir=str(folder), **limits)
        self.members: list[str] = []
        self.joined = self.closed = 0
        self.box: Mailbox | None = None
        self.number = 0
        self.told: list[Desired] = []
        self.report: RouterReport | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def join(self, name: str, fresh: bool) -> str:
        self.joined += 1
        self.members.append(name)
        self.box = Mailbox()
        task = asyncio.ensure_future(self.bring_up(self.box))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self.box.id

    async def bring_up(self, box: Mailbox) -> None:
        """What the controller does to a new member."""
        layer, self.number = self.mesh.layer, self.number + 1
        await box.ask("declare", Desired(revision=self.number, layers={layer.name: layer}))
        order = Order(1, self.number)
        gate = await box.ask("stage", order, Candidate(id=layer.gate_id, counter=1, gate=layer.gate))
        made_of = await box.ask("stage", order, Candidate(id=layer.layer_id, counter=1, layer=layer))
        versions = self.mesh.versions | {layer.gate_id: gate.version, layer.layer_id: made_of.version}
        replicas = tuple(self.mesh.replica(name) for name in self.mesh.hosts)
        update = RouterUpdate(replicas=replicas, epochs={1: versions}, current=1, cluster_id="c")
        report = await box.ask("sync", order, update)
        self.report = await box.ask("sync", order, replace(update, session=report.incarnation))

    async def fetch(
        self, name: str, box: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        if self.box is None or self.box.id != box:
            raise NotFound("there is no such mailbox")
        return await self.box.fetch(answers, held, seconds)

    async def leave(self, name: str) -> None:
        self.members.remove(name)

    def declared(self, desired: Desired) -> None:
        self.told.append(desired)

    def close(self) -> None:
        self.closed += 1

    async def problem(self) -> str:
        return ""

    async def history(self, id: str) -> list[dict[str, Any]]:
        if id not in self.mesh.versions:
            raise NotFound(f"there is no {id}")
        return [{"version": self.mesh.versions[id], "current": True}]

    async def recall(self, epoch: int, ttl: float) -> None:
        raise NotFound(f"there is no epoch {epoch}")

    async def swap(self, request: Any) -> Any:
        raise Unavailable("this controller swaps nothing")

    async def progress(self, swap_id: str) -> dict[str, Any]:
        raise NotFound(f"there is no swap {swap_id}")


@contextmanager
def attached(layer: Layer, folder: Path, **settings: Any) -> Iterator[tuple[AttachedRouter, Home]]:
    """A router that has attached to a home."""
    home = Home(layer, folder, **settings)
    engine = Engine(home)
    engine.start(30.0)
    with AttachedRouter(engine) as router:
        yield router, home


class LocalConnection:
    """A `Connection` to a whole cluster of this process, whose controller has a loop of its own."""

    def __init__(self, name: str, running: SwapCluster) -> None:
        backend: Any = running.cluster._backend
        self.name = name
        self.where: Mapping[str, str] = {}
        self.transport: Any = LocalTransport()
        for id, host in backend._hosts.items():
            self.transport.add(id, host)
        self.settings = ServiceSettings(
            name="test", metrics_port=None, tokens=(), state_dir=str(running.state_dir), max_rows_in_flight=65_536,
            gateway=GatewaySettings(),
        )  # fmt: skip
        self.control = self.seat = LocalSeat(backend._loop, backend._controller, str(running.state_dir))

    def declared(self, desired: Desired) -> None:
        pass

    def close(self) -> None:
        pass


class LocalSeat:
    """The controller of a local cluster from another loop; what is asked may be `frozen` for a while."""

    def __init__(self, loop: asyncio.AbstractEventLoop, controller: Controller, state_dir: str) -> None:
        self._loop, self._controller = loop, controller
        self.thawed = asyncio.Event()
        self.thawed.set()
        if not hasattr(controller, "attached"):  # one for all connections, as the actor has
            port = AllRouters(controller.routers._port)
            controller.routers._port = controller.executor._router = port
            vars(controller)["attached"] = AttachedRouters(self._here, state_dir)
        self._routers: AttachedRouters = vars(controller)["attached"]

    async def _here(self) -> Routers:
        return self._controller.routers

    async def join(self, name: str, fresh: bool) -> str:
        return await elsewhere(self._loop, self._routers.join(name, fresh))

    async def fetch(
        self, name: str, box: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        letters = await elsewhere(self._loop, self._routers.fetch(name, box, answers, held, seconds))
        await self.thawed.wait()
        return letters

    async def leave(self, name: str) -> None:
        await elsewhere(self._loop, self._routers.leave(name))

    async def swap(self, request: SwapRequest) -> SwapResult:
        return await elsewhere(self._loop, self._controller.swap(request))

    async def recall(self, epoch: int, ttl: float) -> None:
        await elsewhere(self._loop, self._controller.recall(epoch, ttl))

    async def problem(self) -> str:
        return self._controller.problem

    async def history(self, id: str) -> list[dict[str, Any]]:
        return self._controller.history(id)

    async def progress(self, swap_id: str) -> dict[str, Any]:
        return self._controller.progress(swap_id)


@contextmanager
def attached_to(running: SwapCluster, name: str = "attached-1") -> Iterator[tuple[AttachedRouter, LocalConnection]]:
    """A router that has attached to a local cluster."""
    connection = LocalConnection(name, running)
    engine = Engine(connection)
    engine.start(30.0)
    with AttachedRouter(engine) as router:
        yield router, connection

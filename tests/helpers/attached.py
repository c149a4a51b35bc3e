"""A cluster of this process for an attached router: hosts, and a controller that has it load one epoch."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.router_in_process import RouterInProcess

from expertmesh.cluster.attach.engine import Engine
from expertmesh.cluster.attach.router import AttachedRouter
from expertmesh.cluster.control.messages import Candidate, Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.gateway.gateway import GatewaySettings
from expertmesh.cluster.runtime.mailbox import Letter, Mailbox
from expertmesh.cluster.runtime.router_process import ServiceSettings
from expertmesh.experts.errors import NotFound, Unavailable
from expertmesh.router.mixture.layer import Layer


class Home:
    """A `Connection` to hosts of this process, and the `Seat` of its controller, on the loop of the attached router.

    `members` are the incarnations that have joined and not left.
    """

    name = "attached-test"

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

    async def join(self, name: str, incarnation: str) -> str:
        self.joined += 1
        self.members.append(incarnation)
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
        receipt = await box.ask("stage", order, Candidate(id=layer.gate_id, counter=1, gate=layer.gate))
        versions = self.mesh.versions | {layer.gate_id: receipt.version}
        replicas = tuple(self.mesh.replica(name) for name in self.mesh.hosts)
        update = RouterUpdate(replicas=replicas, epochs={1: versions}, current=1, cluster_id="c")
        self.report = await box.ask("sync", order, update)

    async def fetch(
        self, name: str, box: str, answers: Mapping[int, Any], held: Collection[int], seconds: float
    ) -> tuple[Letter, ...]:
        if self.box is None or self.box.id != box:
            raise NotFound("there is no such mailbox")
        return await self.box.fetch(answers, held, seconds)

    async def leave(self, name: str, incarnation: str) -> None:
        self.members.remove(incarnation)

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

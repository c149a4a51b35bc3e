"""A whole cluster in one process: hosts, router and controller on one event loop in a thread, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ...experts.errors import Unavailable
from ...experts.host import ExpertHost
from ...experts.staging.stage import Receipt
from ...router.fanout.replica_view import Replica
from ...router.fanout.transport import LocalTransport, report_of
from ..config.layer_changes import LayersRequest
from ..control.controller import Controller, open_controller
from ..control.messages import (
    Candidate,
    Desired,
    RouterReport,
    RouterUpdate,
    ScaleRequest,
    SwapRequest,
    SwapResult,
    proposal_of,
)
from ..control.orders import Order
from ..control.ports import ControllerState, StateSettings
from ..control.routers.mailbox import Letter
from ..machine.logs import configure_logs
from ..placement.plan import PlannedReplica
from .listening import ListeningService
from .owner_desk import OwnerDesk
from .places import Place, place_of
from .router_process import ServiceSettings
from .router_thread import END_SECONDS, end_tasks

T = TypeVar("T")
CALL_TIMEOUT = 60.0
CURE = "nothing ends it with transport local; restart this process"


class LocalBackend:
    """Runs a cluster in this process, for tests and notebooks."""

    temp_dir: str | None = None

    def __init__(self, log_level: str, log_path: str) -> None:
        configure_logs("local", log_level, log_path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="expertmesh-local", daemon=True)
        self._transport = LocalTransport()
        self._hosts: dict[str, ExpertHost] = {}
        self._services: dict[str, ListeningService] = {}
        self._controller: Controller | None = None
        self._desk = OwnerDesk()
        self._turns: asyncio.Future[None] | None = None

    def start(self, address: str | None, timeout: float) -> None:
        """Start the event loop."""
        self._thread.start()

    def _main(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            end_tasks(self._loop)

    def ray(self) -> dict[str, str]:
        """Empty: other processes cannot reach it."""
        return {}

    def lost(self) -> str | None:
        """Always None: what ends this process ends its owner."""
        return None

    def nodes(self) -> None:
        """None: a single process reserves nothing."""

    def start_front(self, routers: Mapping[str, ServiceSettings], state: StateSettings, timeout: float) -> list[Place]:
        """Start the routers and the controller; returns where each router listens."""
        return self._await(self._start_front(routers, state), timeout)

    async def _start_front(self, routers: Mapping[str, ServiceSettings], state: StateSettings) -> list[Place]:
        control = _ControlPort(self._desk)
        self._services = {name: ListeningService(own, self._transport, control) for name, own in routers.items()}
        self._controller = control.controller = open_controller(state, _RouterPort(), _ReplicaPort(self._hosts))
        places = []
        for service, own in zip(self._services.values(), routers.values(), strict=True):
            place = place_of(own, *await service.start())
            service.where = {**place.described(), "node": "local"}
            places.append(place)
        self._turns = asyncio.ensure_future(self._controller.run())
        return places

    def start_replica(self, planned: PlannedReplica) -> None:
        """Create the host of a replica."""
        host = self._hosts[planned.id] = ExpertHost()
        self._transport.add(planned.id, host)

    def stop_replica(self, replica_id: str) -> None:
        """End the thread of a replica, and forget its host; idempotent."""
        self._transport.remove(replica_id)
        self._hosts.pop(replica_id, None)

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """The report of a replica."""
        return report_of(replica_id, self._hosts[replica_id], CURE, node="local")

    def handles(self) -> dict[str, Any]:
        """Empty: the transport holds the hosts."""
        return {}

    def routers(self) -> dict[str, Any]:
        """The router services by name."""
        return dict(self._services)

    def declare(self, desired: Desired, timeout: float) -> dict[str, str]:
        """Have the controller load the declared layers; returns the versions that then serve."""
        return self._await(self._running().declare(desired, timeout), timeout + CALL_TIMEOUT)

    def changes(self, answers: Mapping[int, Any]) -> tuple[Letter, ...]:
        """Answer what was asked of the owner, by number; returns what has no answer yet."""
        return self._await(self._desk.fetch(answers))

    def state(self) -> ControllerState:
        """The state of the controller."""
        return self._running().state()

    def _running(self) -> Controller:
        if self._controller is None:
            raise Unavailable("the controller is not running")
        return self._controller

    def stop(self, grace: float) -> None:
        """Drain, close the port and stop the thread; idempotent."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._await(self._stop(grace))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._transport.close()
        self._loop.close()

    async def _stop(self, grace: float) -> None:
        if self._turns is not None:
            self._turns.cancel()
            await asyncio.wait([self._turns], timeout=END_SECONDS)
        await asyncio.gather(*(service.stop(grace) for service in self._services.values()))
        if self._controller is not None:
            self._controller.close()

    def _await(self, work: Coroutine[Any, Any, T], timeout: float = CALL_TIMEOUT) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)
        except RuntimeError:
            work.close()  # it never began: the loop is closed
            raise


class _ControlPort:
    controller: Controller

    def __init__(self, desk: OwnerDesk) -> None:
        self._desk = desk

    async def change(self, request: ScaleRequest | LayersRequest) -> dict[str, Any]:
        return await self._desk.ask(request)

    async def swap(self, request: SwapRequest) -> SwapResult:
        return await self.controller.swap(request)

    async def progress(self, swap_id: str) -> dict[str, Any]:
        return self.controller.progress(swap_id)

    async def history(self, id: str) -> list[dict[str, Any]]:
        return self.controller.history(id)

    async def declared(self) -> dict[str, Any]:
        return await self.controller.declared()

    async def recall(self, epoch: int, ttl: float) -> None:
        await self.controller.recall(epoch, ttl)

    async def problem(self) -> str:
        return self.controller.problem


class _RouterPort:
    """The routers of this process: the handle of each is its service."""

    async def declare(self, router: str, handle: ListeningService, desired: Desired) -> None:
        await handle.declare(desired)

    async def sync(self, order: Order, router: str, handle: ListeningService, update: RouterUpdate) -> RouterReport:
        return await handle.sync(order, update)

    async def stage(self, order: Order, router: str, handle: ListeningService, candidate: Candidate) -> Receipt:
        return await handle.stage(order, candidate)

    async def unload(self, order: Order, router: str, handle: ListeningService, id: str, version: str) -> None:
        await handle.unload(order, id, version)


class _ReplicaPort:
    """The replicas of this process, which has one controller: whatever it orders is obeyed."""

    def __init__(self, hosts: dict[str, ExpertHost]) -> None:
        self._hosts = hosts

    async def probe(self, order: Order, replica_id: str, handle: Any, given_up: Mapping[str, str]) -> Replica:
        return report_of(replica_id, self._host(replica_id), CURE, node="local")

    async def waits_for(self, needs: Mapping[str, float]) -> str:
        return ""

    async def stage(self, order: Order, replica_id: str, handle: Any, candidate: Candidate) -> Receipt:
        proposal = replace(proposal_of(candidate), weights=candidate.weights)
        return await asyncio.to_thread(self._host(replica_id).stage, proposal, candidate.replaces, candidate.mode)

    async def unload(self, order: Order, replica_id: str, handle: Any, id: str, version: str) -> None:
        self._host(replica_id).unload(id, version)

    def _host(self, replica_id: str) -> ExpertHost:
        host = self._hosts.get(replica_id)
        if host is None:
            raise Unavailable(f"there is no replica {replica_id} in this process")
        return host

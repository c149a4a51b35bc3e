"""A whole cluster in one process: hosts, router and controller on one event loop in a thread, and no Ray."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from ..experts.errors import Unavailable
from ..experts.host import ExpertHost
from ..router.replicas import READY, Replica
from ..router.transport import LocalTransport
from .controller import Controller, Desired, RouterReport
from .logs import configure_logs
from .plan import PlannedReplica
from .service import RouterService, ServiceSettings

T = TypeVar("T")
CALL_TIMEOUT = 60.0


class LocalBackend:
    """Runs a cluster's parts in this process; tests and notebooks use the whole product this way."""

    temp_dir: str | None = None

    def __init__(self, log_level: str, log_path: str) -> None:
        configure_logs("local", log_level, log_path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="expertmesh-local", daemon=True)
        self._transport = LocalTransport()
        self._hosts: dict[str, ExpertHost] = {}
        self._service: RouterService | None = None
        self._controller: Controller | None = None
        self._turns: asyncio.Future[None] | None = None

    def start(self, address: str | None) -> None:
        """Start the event loop."""
        self._thread.start()

    def gpus(self) -> float:
        """No GPU is pinned in a single process."""
        return 0.0

    def start_front(self, settings: ServiceSettings, timeout: float) -> tuple[int, int | None]:
        """Start router and controller; returns the ports of the gateway and of the metrics page."""
        return self._await(self._start_front(settings))

    async def _start_front(self, settings: ServiceSettings) -> tuple[int, int | None]:
        self._service = RouterService(settings, self._transport)
        ports = await self._service.start()
        self._controller = Controller(_Port(self._service), _Probes(self._hosts))
        self._turns = asyncio.ensure_future(self._controller.run())
        return ports

    def start_replica(self, planned: PlannedReplica) -> None:
        """Load the experts of a replica in a host of its own. Raises what loading raises."""
        host = ExpertHost()
        for expert_id, (expert, counter) in planned.experts.items():
            host.load(expert_id, copy.deepcopy(expert), counter)  # each replica has its own, as over a process border
        self._hosts[planned.id] = host
        self._transport.add(planned.id, host)

    def wait_replica(self, replica_id: str, deadline: float) -> Replica:
        """The report of a replica."""
        return _report(replica_id, self._hosts[replica_id])

    def stop_replica(self, replica_id: str) -> None:
        """Forget a replica."""
        self._hosts.pop(replica_id, None)
        self._transport.remove(replica_id)

    def handles(self) -> dict[str, Any]:
        """No handles: the transport has the hosts."""
        return {}

    def apply(self, desired: Desired) -> None:
        """Tell the controller what is to be; returns when the router knows."""
        if self._controller is not None:
            self._await(self._controller.apply(desired))

    def state(self) -> tuple[int, tuple[Replica, ...], RouterReport | None]:
        """The controller's revision, the replicas as it knows them, and the router's last report."""
        controller = self._controller
        if controller is None:
            return 0, (), None
        return controller.desired.revision, controller.replicas(), controller.report

    def stop(self, grace: float) -> None:
        """Drain, close the port and end the thread; idempotent."""
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
        if self._service is not None:
            await self._service.stop(grace)

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT)


class _Port:
    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def apply(self, desired: Desired) -> None:
        self._service.apply(desired)

    async def sync(self, replicas: tuple[Replica, ...]) -> RouterReport:
        return self._service.sync(replicas)


class _Probes:
    def __init__(self, hosts: dict[str, ExpertHost]) -> None:
        self._hosts = hosts

    async def probe(self, replica_id: str, handle: Any) -> Replica:
        host = self._hosts.get(replica_id)
        if host is None:
            raise Unavailable(f"replica {replica_id} is not here")
        return _report(replica_id, host)


def _report(replica_id: str, host: ExpertHost) -> Replica:
    loaded = host.loaded()
    return Replica(
        id=replica_id,
        experts=tuple(item.expert for item in loaded),
        incarnation=host.incarnation,
        holds=frozenset((item.expert, item.version) for item in loaded),
        state=READY,
        node="local",
        pid=os.getpid(),
        device=host.device,
    )

"""One world: processes, weather, crashes and clients, all of it drawn from a seed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from sim.calls import Request
from sim.checker import Checker
from sim.client import Clients
from sim.clock import Clock
from sim.controller import ControllerProcess, Transactions, Watched
from sim.disk import Disk, Registry
from sim.faults import CELLS, Cell, Faults
from sim.network import Network, Process, Weather
from sim.owner import Owner
from sim.replica import Holder, Replica
from sim.router import Router

from expertmesh.cluster.control import controller as product
from expertmesh.cluster.control.executor import Executor
from expertmesh.cluster.control.orders import Orders
from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.cluster.control.replica_health import Health
from expertmesh.cluster.control.routers.leases import RouterLeases
from expertmesh.cluster.control.swap import Swaps

KINDS = ("quiet", "one replica lost", "controller lost", "storm", "storm", "storm")
HORIZON = 24.0
CALM = 38.0
STORM = Weather(lost=0.02, doubled=0.15, slow=0.15, delay=0.1, slow_delay=2.5, silent_death=0.3)
CELLS_AT_ONCE = 3
STORMY_STARTS = 0.25
LEASE = 6.0
"""Seconds after which a router that is not heard is given up: here it happens more often than in truth."""


@dataclass(frozen=True)
class Broken:
    """The rules that a broken world puts in the place of the true ones."""

    reconciler: type[Reconciler] = Reconciler
    swaps: type[Swaps] = Swaps
    executor: type[Executor] = Watched
    transactions: type[Transactions] = Transactions
    registry: type[Registry] = Registry
    replica: type[Replica] = Replica
    router: type[Router] = Router
    orders: type[Orders] = Orders
    health: type[Health] = Health
    leases: type[RouterLeases] = RouterLeases


class World:
    """Builds itself from a seed, runs, and raises `Breach` when a promise is broken."""

    def __init__(self, seed: int, rules: Broken = Broken()) -> None:
        self.seed = seed
        self.kind = KINDS[seed % len(KINDS)]
        self.rules = rules
        self.clock = Clock(seed)
        self.stormy = self.kind == "storm"
        self.lease = LEASE
        self.recalls = seed // len(KINDS) % 2 == 1
        self.network = Network(self.clock, Weather())
        self.checker = Checker(self)
        self.faults = Faults(self, self._cells())
        self.hosts = self._draw_hosts()
        self.experts = tuple(dict.fromkeys(id for ids in self.hosts.values() for id in ids))
        self.replica_names = tuple(self.hosts)
        self.router_names = tuple(f"router-{n}" for n in range(self.clock.rng.choice((1, 2, 2, 3))))
        self.disk = Disk()
        self.open_swaps: set[str] = set()
        self.clients = Clients(self)
        self.owner = Owner(self)
        self._has_started = False
        self._starts = 0
        self._controllers: list[ControllerProcess] = []
        for name in (*self.replica_names, *self.router_names, "controller"):
            self._start(name)
        if self.clock.chance(STORMY_STARTS):
            self._begin_faults()

    # ---- what kind of world it is

    @property
    def quiet(self) -> bool:
        """Only swaps happen."""
        return self.kind == "quiet"

    @property
    def gentle(self) -> bool:
        """No request may fail: replicas are lost one at a time, or the controller is, or the storm is long over."""
        return not self.stormy or self.clock.now >= CALM

    @property
    def swapping(self) -> bool:
        """Whether a swap is under way."""
        return bool(self.controller.controller.reconciler.swaps.active())

    @property
    def disk_fails(self) -> bool:
        """Whether a disk may fail now."""
        return self.faults.on and not self.quiet

    def _cells(self) -> tuple[Cell, ...]:
        """The crashes of this world: every cell has its turn in one world in fifteen."""
        turn = self.seed // len(KINDS)
        if self.kind == "storm":
            first = (3 * turn + self.seed % len(KINDS)) * CELLS_AT_ONCE
            return tuple(CELLS[(first + n) % len(CELLS)] for n in range(CELLS_AT_ONCE))
        actor = {"one replica lost": "replica", "controller lost": "controller"}.get(self.kind)
        own = [cell for cell in CELLS if cell[2] == actor]
        return tuple(own[(turn * CELLS_AT_ONCE + n) % len(own)] for n in range(CELLS_AT_ONCE)) if own else ()

    def _draw_hosts(self) -> dict[str, tuple[str, ...]]:
        """3-5 experts, some of them together in one actor, in 1-3 replicas."""
        rng = self.clock.rng
        left = [f"l/e{n}" for n in range(rng.randint(3, 5))]
        hosts: dict[str, tuple[str, ...]] = {}
        while left:
            size = rng.choice((1, 1, 2))
            together, left = tuple(left[:size]), left[size:]
            fewest, most = {"one replica lost": (2, 3), "quiet": (1, 2)}.get(self.kind, (1, 3))
            for n in range(rng.randint(fewest, most)):
                hosts[f"{together[0]}#{n}"] = together
        return hosts

    # ---- chance

    def loading_time(self) -> float:
        return self.clock.between(0.05, 2.5 if self.stormy else 1.0)

    def computing_time(self) -> float:
        return self.clock.between(0.01, 1.2 if self.clock.chance(0.2) else 0.2)

    def fails(self, step: str) -> bool:
        """Whether a member cannot stage a candidate, or load a version that it had before."""
        if step == "load":
            return self.faults.on and self.stormy and self.clock.chance(0.1)
        return self.faults.on and self.clock.chance(0.05)

    # ---- processes

    @property
    def controller(self) -> ControllerProcess:
        found = self.network.processes["controller"]
        assert isinstance(found, ControllerProcess)
        return found

    def routers(self) -> list[Router]:
        return [found for found in self.network.processes.values() if isinstance(found, Router)]

    def router(self) -> Router:
        """The router that a client happens to ask."""
        return self.clock.rng.choice(self.routers())

    def holders(self) -> list[Holder]:
        return [found for found in self.network.processes.values() if isinstance(found, Holder)]

    def alive(self, actor: str) -> list[Process]:
        """The live processes of one kind."""
        names = {"controller": ("controller",), "router": self.router_names, "replica": self.replica_names}[actor]
        return [found for name in names if (found := self.network.processes[name]).alive]

    def may_crash(self, process: Process) -> bool:
        """In gentle worlds a replica may be lost only while the router could do without it."""
        if self.stormy or not isinstance(process, Replica):
            return True
        if any(not other.alive for other in self.holders()):
            return False
        return all(self._spares(router, process) for router in self.routers())

    def _spares(self, router: Router, replica: Replica) -> bool:
        current = router.epochs.known()
        alive = {found.incarnation for found in self.holders() if found.alive}
        ready = {found.id for found in router.view.replicas() if found.state == "ready" and found.incarnation in alive}
        siblings = [name for name, ids in self.hosts.items() if replica.ids & set(ids) and name != replica.name]
        pairs = [(id, epoch.versions[id]) for epoch in current for id in sorted(replica.ids)]
        return all(
            name in ready and all(router.view.holds(name, *pair) for pair in pairs) for name in siblings
        ) and bool(siblings)

    def crash(self, process: Process) -> None:
        """Kill a process; it comes back, empty, after a while."""
        self.checker.counts[f"crashes of {process.name.rstrip('0123456789').partition('/')[0]}"] += 1
        process.alive = False
        self.network.died(process)
        if isinstance(process, Router):
            process.end()
        self.clock.after(self.clock.between(0.1, 1.5), self._restart, process.name, process)

    def freeze(self, process: Process) -> None:
        """Stop a process for a while: it runs nothing, and what it is sent waits."""
        if process.frozen is None:
            self.checker.counts[f"pauses of {process.name.rstrip('0123456789').partition('/')[0]}"] += 1
            process.frozen = []
            self.clock.after(self.clock.between(0.5, 14.0), process.wake)

    def replace_controller(self) -> None:
        """Start another controller although the first one lives, and does not know."""
        self.checker.counts["controllers given up for dead"] += 1
        self._start("controller")

    def _restart(self, name: str, dead: Process) -> None:
        if self.network.processes[name] is dead:
            self._start(name)

    def _start(self, name: str) -> None:
        self._starts += 1
        incarnation = f"{name}.{self._starts}"
        made: Process
        if name == "controller":
            made = ControllerProcess(self, incarnation)
            self._controllers.append(made)
        elif name in self.hosts:
            made = self.rules.replica(self, name, incarnation, self.hosts[name])
        else:
            made = self.rules.router(self, name, incarnation)
        self.network.processes[name] = made

    # ---- what happens

    def started(self) -> None:
        """The first epoch is served: from now on there are clients, and all that may happen to them."""
        if not self._has_started:
            self._has_started = True
            if self.clock.now < HORIZON:
                self._begin_faults()
            self.clients.begin()
            self.clock.after(self.clock.between(1.0, 8.0), self.owner.keep_editing)

    def _begin_faults(self) -> None:
        self.faults.on = True
        self.network.weather = STORM if self.stormy else Weather()

    def asked(self, swap_id: str) -> Mapping[str, str]:
        """How the versions end that a swap was to bring."""
        return self.owner.asked() if self.is_declared(swap_id) else self.clients.asked[swap_id]

    def is_declared(self, swap_id: str) -> bool:
        """Whether a swap is the controller's own, to bring what is declared."""
        return swap_id not in self.clients.asked

    def ended(self, request: Request) -> None:
        """A request has its answer or its error."""
        self.checker.replied(request)

    def run(self) -> Checker:
        """Let everything happen, then calm down, then look at what is left."""
        log = logging.getLogger(product.__name__.rpartition(".")[0])
        log.addHandler(bugs := Bugs(self.checker))
        try:
            self._run()
        finally:
            log.removeHandler(bugs)
            for process in self._controllers:
                process.alive = False
            for process in self._controllers:
                process.loop.close()
        return self.checker

    def _run(self) -> None:
        self.owner.supervise()
        self.clock.run(HORIZON)
        self.faults.on = False
        self.network.weather = Weather()
        self.clients.calm = True
        for process in self.network.processes.values():
            process.cut_off = False
            process.wake()
        self.clock.run(CALM)
        self.clients.close_leases()
        self.clock.run(CALM + 16.0)
        self.checker.at_the_end()


class Bugs(logging.Handler):
    """Takes what the product logs as an error for what it is."""

    def __init__(self, checker: Checker) -> None:
        super().__init__(logging.ERROR)
        self._checker = checker

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._checker.bug(error)

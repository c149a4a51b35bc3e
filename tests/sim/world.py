"""One world: processes, weather, crashes and clients, all of it drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sim.calls import Request
from sim.checker import Checker
from sim.client import Clients
from sim.clock import Clock
from sim.controller import Controller
from sim.faults import CELLS, Cell, Faults
from sim.network import Network, Process, Weather
from sim.registry import Registry
from sim.replica import Holder, Replica
from sim.router import GATE, Router

from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.experts.errors import FailedPrecondition, Unavailable

KINDS = ("quiet", "one replica lost", "controller lost", "storm", "storm", "storm")
HORIZON = 24.0
CALM = 34.0
STORM = Weather(lost=0.02, doubled=0.05, slow=0.15, delay=0.1, slow_delay=2.5, silent_death=0.3)
CELLS_AT_ONCE = 3
DISK_FULL, DISK_SILENT, DISK_LATE = 0.03, 0.06, 0.1


@dataclass(frozen=True)
class Broken:
    """The rules that a broken world puts in the place of the true ones."""

    control: type[Reconciler] = Reconciler
    registry: type[Registry] = Registry
    replica: type[Replica] = Replica
    router: type[Router] = Router
    controller: type[Controller] = Controller


class World:
    """Builds itself from a seed, runs, and raises `Breach` when a promise is broken."""

    def __init__(self, seed: int, rules: Broken = Broken()) -> None:
        self.seed = seed
        self.kind = KINDS[seed % len(KINDS)]
        self.rules = rules
        self.clock = Clock(seed)
        self.stormy = self.kind == "storm"
        self.network = Network(self.clock, STORM if self.stormy else Weather())
        self.checker = Checker(self)
        self.faults = Faults(self, self._cells())
        self._hosts = self._draw_hosts()
        self.experts = tuple(dict.fromkeys(id for ids in self._hosts.values() for id in ids))
        self.router_names = tuple(f"router{n}" for n in range(self.clock.rng.randint(1, 3)))
        self.replica_names = tuple(self._hosts)
        self.registry = rules.registry(dict.fromkeys((*self.experts, GATE), "v1-0"))
        self.open_swaps: set[str] = set()
        self._starts = 0
        for name in (*self.replica_names, *self.router_names):
            self._start(name)
        self._start("controller")
        self.clients = Clients(self)

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
        return bool(self.controller.control.swaps.active())

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

    def stage_fails(self) -> bool:
        return self.faults.on and self.clock.chance(0.05)

    def load_fails(self) -> bool:
        return self.faults.on and self.stormy and self.clock.chance(0.1)

    # ---- processes

    @property
    def controller(self) -> Controller:
        found = self.network.processes["controller"]
        assert isinstance(found, Controller)
        return found

    def routers(self) -> list[Router]:
        return [found for name in self.router_names if isinstance(found := self.network.processes[name], Router)]

    def holders(self) -> list[Holder]:
        return [found for found in self.network.processes.values() if isinstance(found, Holder)]

    def alive(self, actor: str) -> list[Process]:
        """The live processes of one kind."""
        names = {"controller": ("controller",), "router": self.router_names, "replica": self.replica_names}[actor]
        return [found for name in names if (found := self.network.processes[name]).alive]

    def may_crash(self, process: Process) -> bool:
        """In gentle worlds a replica may be lost only while every router could do without it."""
        if self.stormy or not isinstance(process, Replica):
            return True
        if any(not other.alive for other in self.holders()):
            return False
        return all(self._spares(router, process) for router in self.routers())

    def _spares(self, router: Router, replica: Replica) -> bool:
        current = router.epochs.known()
        alive = {found.incarnation for found in self.holders() if found.alive}
        ready = {found.id for found in router.view.replicas() if found.state == "ready" and found.incarnation in alive}
        siblings = [name for name, ids in self._hosts.items() if replica.ids & set(ids) and name != replica.name]
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
            process.fence()
        self.clock.after(self.clock.between(0.1, 1.5), self._restart, process.name, process)

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
            made = self.rules.controller(self, incarnation)
        elif name in self._hosts:
            made = self.rules.replica(self, name, incarnation, self._hosts[name])
        else:
            made = self.rules.router(self, name, incarnation)
        self.network.processes[name] = made

    # ---- what happens

    def make_control(self) -> Reconciler:
        """The decisions of a new controller."""
        return self.rules.control()

    def commit(self, controller: Controller, swap_id: str, versions: Mapping[str, str]) -> int:
        """The registry's transaction: all of it or nothing."""
        chance = self.clock.rng.random() if self.faults.on and not self.quiet else 1.0
        new = swap_id not in self.registry.swaps
        if chance < DISK_FULL and new:
            raise FailedPrecondition("the disk is full")
        if chance < DISK_SILENT:
            raise Unavailable("the disk does not answer")
        if self.registry.is_writer(controller.term):
            self.checker.committing(controller, swap_id)
        epoch = self.registry.commit(controller.term, swap_id, versions)
        if new:
            self.checker.committed(epoch, swap_id, self.clients.asked[swap_id])
        if chance < DISK_LATE:
            if self.stormy:  # a controller that waits for a disk is soon given up
                self.clock.after(0.1, self.replace_controller)
            raise Unavailable("the disk has done it, but did not say so in time")
        return epoch

    def ended(self, request: Request) -> None:
        """A request has its answer or its error."""
        self.checker.replied(request)

    def run(self) -> Checker:
        """Let everything happen, then calm down, then look at what is left."""
        self.clients.begin()
        self.clock.run(HORIZON)
        self.faults.on = False
        self.network.weather = Weather()
        self.clients.calm = True
        for process in self.network.processes.values():
            process.cut_off = False
        self.clock.run(CALM)
        self.clients.close_leases()
        self.clock.run(CALM + 8.0)
        self.checker.at_the_end()
        return self.checker

"""What must always hold: the promises, checked at each commit, each answer, and at the end. A breach ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sim.calls import Request
from sim.replica import Holder
from sim.router import Router

from expertmesh.experts.errors import ExpertMeshError, VersionGone

if TYPE_CHECKING:
    from sim.controller import Controller
    from sim.world import World

MOST_SLOTS = 3
"""Versions of one id that a member may hold at a time: stable, and candidate or draining, and one that is leaving."""


class Breach(AssertionError):
    """A promise was broken."""


class Checker:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.counts: Counter[str] = Counter()
        self._acknowledged: dict[str, tuple[int, Mapping[str, str]]] = {}
        self._refused: set[str] = set()
        self._adopted: dict[str, int] = {}

    def demand(self, holds: bool, promise: str, what: str) -> None:
        """Stop here unless it holds."""
        if not holds:
            raise Breach(f"{promise}, at {self.world.clock.now:.3f}: {what}")

    # ---- swaps

    def committing(self, controller: Controller, swap_id: str) -> None:
        """Look at a commit that the registry is about to make durable."""
        own, newest = controller.term, self.world.registry.term
        self.demand(own == newest, "fencing", f"term {own} commits {swap_id}, {newest} has taken over")

    def receipts(self, controller: Controller, swap_id: str, versions: Mapping[str, str]) -> None:
        """Look at a commit when it is ordered: whoever is live must hold what begins to serve."""
        world = self.world
        if controller.term != world.registry.term:
            return
        for name, member in controller.control.members().items():
            process = world.network.processes.get(name)
            if isinstance(process, Holder) and process.alive and process.incarnation == member:
                lacks = [(id, v) for id, v in versions.items() if id in process.ids and (id, v) not in process.slots]
                self.demand(not lacks, "receipts", f"{swap_id} commits, {name} does not hold {lacks}")

    def committed(self, number: int, swap_id: str, asked: Mapping[str, str]) -> None:
        """Look at a new epoch: the one before, with the whole set changed, and nothing else."""
        history = self.world.registry.history
        wanted = {**history[number - 1], **asked}
        self.demand(dict(history[number]) == wanted, "no third state", f"{swap_id} made {history[number]}")
        self.demand(number == max(history), "epochs only grow", f"{swap_id} made {number} of {sorted(history)}")
        rollback = swap_id.startswith("rollback")
        for id, version in asked.items():
            newer = _counter(version) >= max(_counter(epoch[id]) for n, epoch in history.items() if n < number)
            self.demand(newer or rollback, "versions are monotonic", f"{swap_id}: {id} {version}")
        self.counts["committed"] += 1

    def answered(
        self, swap_id: str, asked: Mapping[str, str], epoch: int | None, error: ExpertMeshError | None
    ) -> None:
        """A client was told what became of its swap."""
        registry = self.world.registry
        if epoch is not None:
            self.counts["acknowledged"] += 1
            self.demand(registry.swaps.get(swap_id) == epoch, "acknowledged is durable", f"{swap_id} at {epoch}")
            self._acknowledged[swap_id] = (epoch, asked)
        else:
            self.counts[f"refused {type(error).__name__}"] += 1
            self._refused.add(swap_id)

    def holds(self, member: Holder) -> None:
        """A member has put a version in a slot."""
        if self.world.quiet:
            most = max(Counter(id for id, _ in member.slots).values())
            self.demand(most <= MOST_SLOTS, "at most two live versions", f"{member.name} holds {sorted(member.slots)}")

    # ---- requests

    def adopted(self, router: Router, number: int) -> None:
        """A router has made an epoch the current one."""
        before = self._adopted.get(router.incarnation, 0)
        self.demand(number > before, "routers only go forward", f"{router.incarnation}: {before} -> {number}")
        self._adopted[router.incarnation] = number

    def pinned(self, request: Request) -> None:
        """A request has pinned an epoch."""
        assert request.epoch is not None
        known = self.world.registry.history.get(request.epoch.number)
        self.demand(known == request.epoch.versions, "durable before served", f"epoch {request.epoch.number}")

    def replied(self, request: Request) -> None:
        """A request has ended: its answers are of exactly one epoch, and in quiet worlds none fails."""
        if request.error is None:
            self.counts["answered"] += 1
            assert request.epoch is not None
            versions = self.world.registry.history[request.epoch.number]
            mixed = [(id, version) for id, version in request.answers if versions[id] != version]
            self.demand(not mixed, "no mix", f"request {request.number} on {request.epoch.number}: {mixed}")
            if request.epoch.number < request.router.epochs.number:
                self.counts["overlapped a flip"] += 1
        else:
            self.counts[f"failed {type(request.error).__name__}"] += 1
            self.demand(not self.world.gentle, "no request fails", f"request {request.number}: {request.error!r}")
            if isinstance(request.error, VersionGone) and request.lease:
                self.counts["leased version gone"] += 1
        if self.world.quiet:
            self.demand(request.gone == 0, "what is pinned is held", f"request {request.number} found a version gone")

    # ---- the end

    def at_the_end(self) -> None:
        """When faults have stopped and time has passed: one committed set, everywhere, and nothing left over."""
        world, registry = self.world, self.world.registry
        versions = registry.epochs[registry.current]
        for swap_id, (epoch, asked) in self._acknowledged.items():
            kept = all(registry.history[epoch][id] == version for id, version in asked.items())
            self.demand(kept, "acknowledged is durable", swap_id)
        for swap_id in self._refused:
            self.demand(swap_id not in registry.swaps, "refused changes nothing", swap_id)
        control = world.controller.control
        self.demand(not control.swaps.active(), "every swap ends", f"{[s.history for s in control.swaps.active()]}")
        self.demand(control.current == registry.current, "the controller follows the registry", f"{control.current}")
        self.demand(not world.open_swaps, "every swap is answered", f"{sorted(world.open_swaps)}")
        for router in world.routers():
            self.demand(router.epochs.number == registry.current, "routers follow", f"{router.incarnation}")
            self.demand(not router.epochs.pins(), "nothing is draining", f"{router.name}: {router.epochs.pins()}")
        for holder in world.holders():
            wanted = {(id, versions[id]) for id in holder.ids}
            self.demand(holder.slots == wanted, "one set", f"{holder.name} holds {sorted(holder.slots)}, not {wanted}")


def _counter(version: str) -> int:
    return int(version[1:].partition("-")[0])

"""What must always hold: the promises, checked at each commit, each answer, and at the end. A breach ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sim.calls import Request
from sim.replica import Holder
from sim.router import Router

from expertmesh.cluster.control.messages import SwapResult
from expertmesh.experts.errors import ExpertMeshError, VersionGone

if TYPE_CHECKING:
    from sim.controller import ControllerProcess
    from sim.world import World

MOST_SLOTS = 3
"""Versions of one id that a replica may hold at a time: stable, and candidate or draining, and one that is leaving."""
MOST_GATES = 4
"""Those of a gate at a router: two may be leaving, where another router lets go of them late."""


class Breach(AssertionError):
    """A promise was broken."""


class Checker:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.counts: Counter[str] = Counter()
        self.acknowledged = 0
        """The newest epoch of which a client was told that it is served."""
        self._acknowledged: dict[str, tuple[int, Mapping[str, str]]] = {}
        self._refused: set[str] = set()
        self._adopted: dict[str, int] = {}
        self._heard: dict[str, int] = {}

    def demand(self, holds: bool, promise: str, what: str) -> None:
        """Stop here unless it holds, also where the product would go on after any exception."""
        if not holds:
            breach = Breach(f"{promise}, at {self.world.clock.now:.3f}: {what}")
            self.world.clock.failure = self.world.clock.failure or breach
            raise breach

    def bug(self, error: BaseException) -> None:
        """An exception that nobody expected, in the controller."""
        self.demand(isinstance(error, Breach), "no bug is passed over", repr(error))

    # ---- swaps

    def receipts(self, process: ControllerProcess, swap_id: str, versions: Mapping[str, str]) -> None:
        """Look at a commit when it is decided: whoever is live must hold what begins to serve."""
        world = self.world
        if process.term != world.disk.term:
            return
        for name, incarnation in process.controller.reconciler.members().items():
            member = world.network.processes.get(name)
            if isinstance(member, Holder) and member.alive and member.incarnation == incarnation:
                lacks = [(id, v) for id, v in versions.items() if id in member.ids and (id, v) not in member.slots]
                self.demand(not lacks, "receipts", f"{swap_id} commits, {name} does not hold {lacks}")

    def committed(self, term: int, number: int, swap_id: str) -> None:
        """Look at a new epoch: by the newest controller, the one before with the whole set changed, and nothing else,
        and all of it stored."""
        disk = self.world.disk
        self.demand(term == disk.term, "fencing", f"term {term} commits {swap_id}, {disk.term} has taken over")
        before, made = disk.history.get(number - 1, {}), disk.history[number]
        self.demand(
            number == max(disk.history), "epochs only grow", f"{swap_id} made {number} of {sorted(disk.history)}"
        )
        asked = self.world.asked(swap_id)
        kept = {id: version for id, version in made.items() if id not in asked}
        wanted = {id: version for id, version in before.items() if id not in asked}
        whole = kept == wanted and all(made.get(id, "").endswith(ending) for id, ending in asked.items())
        self.demand(whole, "no third state", f"{swap_id} made {made} of {before}, asked were {asked}")
        lost = [(id, version) for id, version in made.items() if (id, version) not in disk.folders]
        self.demand(not lost, "stored before durable", f"{swap_id} commits {lost}")
        for id in asked:
            older = [_counter(epoch[id]) for n, epoch in disk.history.items() if n < number]
            newer = _counter(made[id]) > max(older, default=0)
            rollback = swap_id.startswith("rollback")
            self.demand(newer or rollback, "versions are monotonic", f"{swap_id}: {id} {made[id]}")
        if self.world.is_declared(swap_id):
            self.demand(bool(asked), "what is not edited stays", f"{swap_id} brings nothing that was not there")
            disk.declared.update(asked)
            self.counts["committed declarations"] += 1
        self.counts["committed"] += 1

    def answered(self, swap_id: str, asked: Mapping[str, str], result: SwapResult | ExpertMeshError) -> None:
        """A client was told what became of its swap."""
        if isinstance(result, SwapResult):
            self.counts["acknowledged"] += 1
            made = self.world.disk.swaps.get(swap_id)
            self.demand(made == result.epoch, "acknowledged is durable", f"{swap_id} at {result.epoch}")
            after = {id: self.world.disk.history[result.epoch][id] for id in asked}
            told = f"{swap_id}: {result.after}, not {after}"
            self.demand(result.after == after, "acknowledged is what was done", told)
            before = {id: self.world.disk.history.get(result.epoch - 1, {}).get(id, "") for id in asked}
            self.demand(result.before == before, "no update is lost", f"{swap_id}: {result.before}, not {before}")
            self._acknowledged[swap_id] = (result.epoch, asked)
            if result.flipped:
                self.acknowledged = max(self.acknowledged, result.epoch)
        else:
            self.counts[f"refused {type(result).__name__}"] += 1
            self._refused.add(swap_id)

    def obeyed(self, member: Holder, term: int) -> None:
        """A member obeys a controller: never one of before another that it has heard."""
        heard = self._heard.get(member.incarnation, 0)
        self.demand(term >= heard, "members obey the newest", f"{member.incarnation} obeys {term} after {heard}")
        self._heard[member.incarnation] = term

    def holds(self, member: Holder) -> None:
        """A member has put a version in a slot."""
        if self.world.quiet and not self.world.recalls:
            most = max(Counter(id for id, _ in member.slots).values())
            bound = MOST_GATES if isinstance(member, Router) else MOST_SLOTS
            self.demand(most <= bound, "at most two live versions", f"{member.name} holds {sorted(member.slots)}")

    def unloads(self, member: Holder, pair: tuple[str, str]) -> None:
        """A replica forgets a version: no router that may answer may need it, unless another replica holds it."""
        others = [found for found in self.world.holders() if found is not member and found.alive]
        if isinstance(member, Router) or any(pair in found.slots for found in others):
            return
        for router in self.world.routers():
            if router.alive and router.standing.kept and not router.is_refused():
                pinned = {*router.epochs.pins()} - router.doubtful | {router.epochs.number}
                named = [e.number for e in router.epochs.known() if e.number in pinned and pair in e.versions.items()]
                self.demand(not named, "what is pinned stays", f"{router.session} pins {named}, {pair} goes")

    # ---- requests

    def adopted(self, router: Router, number: int) -> None:
        """A router has made an epoch the current one."""
        before = self._adopted.get(router.incarnation, 0)
        self.demand(number > before, "routers only go forward", f"{router.incarnation}: {before} -> {number}")
        self._adopted[router.incarnation] = number

    def recalled(self, router: Router, number: int) -> None:
        """A router was told that an epoch is loaded: it offers it, for a while."""
        if self.world.quiet:
            self.demand(router.epochs.knows(number), "what is recalled is offered", f"epoch {number}")

    def pinned(self, request: Request) -> None:
        """A request has pinned an epoch."""
        assert request.epoch is not None
        known = self.world.disk.history.get(request.epoch.number)
        self.demand(known == request.epoch.versions, "durable before served", f"epoch {request.epoch.number}")

    def replied(self, request: Request) -> None:
        """A request has ended: its answers are of exactly one epoch, and in quiet worlds none fails."""
        if request.error is None:
            self.counts["answered"] += 1
            self.counts["answered by an old epoch"] += 0 < request.old < request.router.epochs.number
            assert request.epoch is not None
            versions = self.world.disk.history[request.epoch.number]
            fixed = request.lease or request.old
            stale = f"request {request.number} of {request.router.session} on {request.epoch.number}"
            newest = f"{request.acknowledged} was acknowledged before it"
            fresh = bool(fixed) or request.epoch.number >= request.acknowledged
            self.demand(fresh, "no stale answer", f"{stale}, {newest}")
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
        world, disk = self.world, self.world.disk
        self.demand(disk.current > 0, "what is declared is served", "there is no epoch")
        versions = disk.history[disk.current]
        for swap_id, (epoch, asked) in self._acknowledged.items():
            kept = all(disk.history[epoch][id].endswith(ending) for id, ending in asked.items())
            self.demand(kept, "acknowledged is durable", swap_id)
        for swap_id in self._refused:
            self.demand(swap_id not in disk.swaps, "refused changes nothing", swap_id)
        reconciler = world.controller.controller.reconciler
        open_swaps = [swap.history for swap in reconciler.swaps.active()]
        self.demand(not open_swaps, "every swap ends", f"{open_swaps}")
        self.demand(reconciler.current == disk.current, "the controller follows the registry", f"{reconciler.current}")
        revision, declared = world.controller.controller.state().revision, world.owner.desired.revision
        self.demand(revision == declared, "the controller follows its owner", f"at {revision}, not {declared}")
        self.demand(not world.owner.asked(), "what is declared is served", f"{world.owner.asked()} is missing")
        self.demand(not world.open_swaps, "every swap is answered", f"{sorted(world.open_swaps)}")
        for router in world.routers():
            self.demand(router.serves, "routers come back", f"{router.incarnation}: {router.standing.problem}")
            self.demand(router.epochs.number == disk.current, "routers follow", f"{router.incarnation}")
            self.demand(not router.epochs.pins(), "nothing is draining", f"{router.name}: {router.epochs.pins()}")
        for holder in world.holders():
            wanted = {(id, versions[id]) for id in holder.ids}
            self.demand(holder.slots == wanted, "one set", f"{holder.name} holds {sorted(holder.slots)}, not {wanted}")


def _counter(version: str) -> int:
    return int(version[1:].partition("-")[0])

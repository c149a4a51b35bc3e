"""The shell round `Reconciler` as the controller's process has it: probes, actions, time-outs, the registry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sim.network import Process, Reply
from sim.router import GATE, LEASE

from expertmesh.cluster.control.events import (
    Action,
    CommitSwap,
    FinishSwap,
    LoadVersion,
    StageCandidate,
    Sync,
    UnloadVersion,
)
from expertmesh.cluster.control.reconciler import Reconciler, refuse_unless_current
from expertmesh.experts.errors import ExpertMeshError, Fenced, Unavailable
from expertmesh.router.fanout.replica_view import READY
from expertmesh.router.fanout.replica_view import Replica as Reported

if TYPE_CHECKING:
    from sim.world import World

TURN = 1.0
PROBE_TIMEOUT = 2.0
STAGE_TIMEOUT = 4.0
STAGING_LIMIT = 7.0
RETAIN_EPOCHS = 1


class Controller(Process):
    """Carries out what `Reconciler` actions, and tells it what comes back. It takes over from whoever was before it."""

    gives_up_in_silence = True

    def __init__(self, world: World, incarnation: str) -> None:
        super().__init__("controller", incarnation)
        self.world = world
        self.term = world.registry.acquire()
        self.control = world.make_control()
        self.reported: dict[str, Reported] = {}
        self._actions = 0
        self._candidates: dict[str, dict[str, str]] = {}
        self._asked_by: dict[str, list[Reply]] = {}
        self._outcomes: dict[str, tuple[int | None, ExpertMeshError | None]] = {}
        self._unheard = {*world.replica_names, *world.router_names}
        self._routers: dict[str, str] = {}
        self._leases = dict.fromkeys(world.router_names, world.clock.now + TURN)
        self._silent: set[str] = set()
        self.perform(self.control.restore(world.registry.epochs, world.router_names))
        self._turn()

    # ---- turns

    def _turn(self) -> None:
        if not self.alive:
            return
        if not self.world.registry.is_writer(self.term):
            self.alive = False
            return
        for name in self.world.replica_names:
            self._probe(name)
        for name in self.world.router_names:
            self._watch(name)
        self.world.clock.after(TURN, self._turn)

    def _probe(self, name: str) -> None:
        mark = self.control.mark(name)
        self.world.network.call(
            self, name, "report", (self.term,), lambda found: self._probed(name, mark, found), PROBE_TIMEOUT
        )

    def _probed(self, name: str, mark: int, found: Any) -> None:
        self._unheard.discard(name)
        if found is None:
            self._member_lost(name)
        elif self.control.mark(name) == mark:
            incarnation, ids, holds = found
            self.reported[name] = Reported(name, tuple(sorted(ids)), incarnation, holds, READY)
            self.perform(self.control.member_reported(name, incarnation, ids, holds))

    def _member_lost(self, name: str) -> None:
        self.reported.pop(name, None)
        self.perform(self.control.member_lost(name))

    # ---- routers and their leases

    def _watch(self, name: str) -> None:
        if name not in self._silent:
            self._sync(name)
            return
        if self.world.clock.now >= self._leases[name] + LEASE:
            self._router_lost(name)
        self.world.network.call(
            self, name, "hello", (self.term,), lambda found: self._greeted(name, found), PROBE_TIMEOUT
        )

    def _greeted(self, name: str, incarnation: str | None) -> None:
        if incarnation is not None:
            self._silent.discard(name)
            if self._routers.get(name, incarnation) != incarnation:
                self._router_lost(name)

    def _router_lost(self, name: str) -> None:
        self._routers.pop(name, None)
        self._member_lost(name)
        self.perform(self.control.router_lost(name))

    def _sync(self, name: str) -> None:
        """Tell a router all; but no epochs without the replicas, and no replicas before everybody was heard."""
        control = self.control
        self._leases[name] = max(self._leases[name], self.world.clock.now)
        replicas = None if self._unheard else tuple(self.reported[key] for key in sorted(self.reported))
        epochs = {} if self._unheard else control.known_to_routers()
        self._actions += 1
        told = ((self.term, self._actions), self.world.clock.now, epochs, control.current, replicas)
        mark = control.mark(name)
        self.world.network.call(self, name, "sync", told, lambda found: self._synced(name, mark, found), PROBE_TIMEOUT)

    def _synced(self, name: str, mark: int, found: Any) -> None:
        self._unheard.discard(name)
        if found is None:
            self._silent.add(name)
            return
        incarnation, epoch, oldest_pinned, gates = found
        if self._routers.get(name, incarnation) != incarnation:
            self._router_lost(name)
            mark = self.control.mark(name)
        self._routers[name] = incarnation
        if self.control.mark(name) == mark:
            self.perform(self.control.member_reported(name, incarnation, frozenset([GATE]), gates))
        self.world.faults.reached("sync", "reported", self)
        if self.alive:
            self.perform(self.control.router_reported(name, epoch, oldest_pinned))

    # ---- actions

    def perform(self, actions: Iterable[Action]) -> None:
        """Carry out actions, as long as this process lives."""
        for order in actions:
            step = STEPS[type(order)]
            self.world.faults.reached(step, "before", self)
            if not self.alive:
                return
            self._actions += 1
            getattr(self, f"_do_{step}")(order)

    def _do_stage(self, order: StageCandidate) -> None:
        version = self._candidates[order.swap_id][order.id]
        arguments = ((self.term, self._actions), order.incarnation, order.id, version)
        self.world.network.call(
            self, order.member, "stage", arguments, lambda found: self._staged(order, found), STAGE_TIMEOUT
        )

    def _staged(self, order: StageCandidate, found: object) -> None:
        at = (order.swap_id, order.member, order.incarnation, order.id)
        self.world.faults.reached("receipt", "before", self)
        if not self.alive:
            return
        if found is None:
            self._member_lost(order.member)
        elif isinstance(found, ExpertMeshError):
            self.perform(self.control.stage_refused(*at, found))
        else:
            self._now_holds(order.member, order.incarnation, order.id, str(found))
            for _ in range(2 if self.world.clock.chance(0.1) else 1):
                self.perform(self.control.staged(*at, str(found)))
        self.world.faults.reached("receipt", "after", self)

    def _do_load(self, order: LoadVersion) -> None:
        arguments = ((self.term, self._actions), order.incarnation, order.id, order.version)
        self.world.network.call(
            self, order.member, "load", arguments, lambda found: self._loaded(order, found), STAGE_TIMEOUT
        )

    def _loaded(self, order: LoadVersion, found: object) -> None:
        if found is None:
            self._member_lost(order.member)
        elif isinstance(found, ExpertMeshError):
            self.control.load_failed(order.member, order.incarnation, order.id, order.version)
        else:
            self._now_holds(order.member, order.incarnation, order.id, order.version)
            self.perform(self.control.loaded(order.member, order.incarnation, order.id, order.version))

    def _now_holds(self, name: str, incarnation: str, id: str, version: str) -> None:
        known = self.reported.get(name)
        if known is not None and known.incarnation == incarnation:
            holds = known.holds | {(id, version)}
            self.reported[name] = Reported(name, known.experts, incarnation, holds, READY)

    def _do_unload(self, order: UnloadVersion) -> None:
        known = self.reported.get(order.member)
        if known is not None:
            holds = known.holds - {(order.id, order.version)}
            self.reported[order.member] = Reported(order.member, known.experts, known.incarnation, holds, READY)
        arguments = ((self.term, self._actions), order.incarnation, order.id, order.version)
        self.world.network.call(self, order.member, "unload", arguments, lambda _: None, STAGE_TIMEOUT)

    def _do_commit(self, order: CommitSwap) -> None:
        self.world.checker.receipts(self, order.swap_id, order.versions)
        self.world.clock.after(self.world.clock.between(0.005, 0.1), self._commit, order)

    def _commit(self, order: CommitSwap) -> None:
        if not self.alive:
            return
        try:
            epoch = self.world.commit(self, order.swap_id, order.versions)
        except Unavailable:  # whether it is durable is not known: ask again until it is
            self.world.clock.after(0.2, self._commit, order)
            return
        except ExpertMeshError as error:
            if isinstance(error, Fenced) and self.gives_up_in_silence:
                self.alive = False  # the other one knows what became of the swap: whoever asked asks there
                return
            self.perform(self.control.commit_refused(order.swap_id, error))
            return
        self.world.faults.reached("commit", "after", self)
        if self.alive:
            self.perform(self.control.committed(order.swap_id, epoch, self.world.registry.epochs[epoch]))
            self._collect()

    def _collect(self) -> None:
        registry = self.world.registry
        oldest = min(registry.current - RETAIN_EPOCHS, self.control.oldest_needed())
        registry.collect(self.term, [number for number in registry.epochs if number >= oldest])
        self.control.forget_epochs(registry.epochs)

    def _do_sync(self, _: Sync) -> None:
        for name in self.world.router_names:
            if name not in self._silent:
                self._sync(name)

    def _do_answer(self, order: FinishSwap) -> None:
        self._outcomes[order.swap_id] = (order.epoch, order.error)
        for reply in self._asked_by.pop(order.swap_id, []):
            reply((order.epoch, order.error))
        self.world.faults.reached("answer", "after", self)

    # ---- swaps

    def on_swap(
        self, reply: Reply, deadline: float, swap_id: str, versions: dict[str, str], expect: dict[str, str]
    ) -> None:
        """Begin a swap, or join the one of this id; replies with (epoch, error)."""
        registry, now = self.world.registry, self.world.clock.now
        if now >= deadline:
            return
        if swap_id in registry.swaps:
            reply((registry.swaps[swap_id], None))
        elif swap_id in self._outcomes:
            reply(self._outcomes[swap_id])
        elif self._unheard:
            self._refuse(reply, swap_id, Unavailable("the controller is still looking round"))
        elif swap_id in self._candidates:
            self._asked_by.setdefault(swap_id, []).append(reply)
        else:
            self._begin(reply, swap_id, versions, expect)

    def _begin(self, reply: Reply, swap_id: str, versions: dict[str, str], expect: dict[str, str]) -> None:
        control: Reconciler = self.control
        try:
            refuse_unless_current(expect, control.epochs[control.current])
            self._candidates[swap_id] = versions
            actions = control.swap_asked(swap_id, frozenset(versions))
        except ExpertMeshError as error:
            self._refuse(reply, swap_id, error)
            return
        self._asked_by[swap_id] = [reply]
        self.world.clock.after(STAGING_LIMIT, self._time_up, swap_id)
        self.perform(actions)

    def _refuse(self, reply: Reply, swap_id: str, error: ExpertMeshError) -> None:
        """Say no, and say so again when the question comes again: it may have been doubled on its way."""
        self._outcomes[swap_id] = (None, error)
        reply((None, error))

    def _time_up(self, swap_id: str) -> None:
        if self.alive:
            self.perform(self.control.time_up(swap_id))


STEPS: dict[type[Action], str] = {
    StageCandidate: "stage",
    LoadVersion: "load",
    UnloadVersion: "unload",
    CommitSwap: "commit",
    Sync: "sync",
    FinishSwap: "answer",
}

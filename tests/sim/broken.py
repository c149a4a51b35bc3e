"""Rules broken on purpose, one at a time: the checker must notice each, or it proves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sim.controller import Controller
from sim.registry import Registry
from sim.replica import Replica
from sim.router import Router
from sim.world import Broken, World

from expertmesh.cluster.control.events import Action, CommitSwap, MemberReported
from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.cluster.control.retention import Versions
from expertmesh.cluster.control.swap import Phase, Swap, Swaps
from expertmesh.router.epochs.epochs import Epoch, Epochs


def _control_with(swap: type[Swap]) -> type[Reconciler]:
    """A `Reconciler` whose swaps are of another make."""

    class Others(Swaps):
        def begin(self, swap_id: str, ids: frozenset[str], draining: object = ()) -> Swap:
            super().begin(swap_id, ids, draining)  # type: ignore[arg-type]
            self._active[swap_id] = swap(swap_id, ids)
            return self._active[swap_id]

    class Changed(Reconciler):
        def __init__(self) -> None:
            super().__init__()
            self.swaps = Others()

    return Changed


class FlipsEarly(Swap):
    """Commits as soon as every id has one receipt, whoever else still stages."""

    def _ready(self) -> list[Action]:
        if self.phase is not Phase.STAGING or set(self.versions()) != self.ids:
            return []
        self.phase = Phase.COMMITTING
        return [CommitSwap(self.swap_id, self.versions())]


class CountsOldReceipts(Swap):
    """Keeps the receipts of a member that has restarted since."""

    def _forget(self, member: str) -> None:
        kept = dict(self._receipts)
        super()._forget(member)
        self._receipts = kept

    def _member(self, event: MemberReported) -> list[Action]:
        return [*super()._member(event), *self._ready()]


class RetiresEarly(Reconciler):
    """Does not look at pins before it unloads."""

    def _pinned(self) -> list[int]:
        return []


class ForgetsRoutersAtStart(Reconciler):
    """Unloads after a restart although it does not know yet what routers pin."""

    def restore(self, epochs: Mapping[int, Versions], routers: object = ()) -> list[Action]:
        return super().restore(epochs)


class BelievesOldReports(Reconciler):
    """Takes reports that are older than a receipt."""

    def mark(self, member: str) -> int:
        return 0


class PretendsToHold(Replica):
    """After a restart it loads the current versions alone, reports all, and answers with what it has."""

    def __init__(self, world: World, name: str, incarnation: str, ids: tuple[str, ...]) -> None:
        super().__init__(world, name, incarnation, ids)
        current = world.registry.epochs[world.registry.current]
        if world.clock.now:
            self.slots = {(id, version) for id in ids for version in _named(world, id)}
            self._has = {id: current[id] for id in ids}

    def found(self, expert: str, version: str) -> str | None:
        known = getattr(self, "_has", {}).get(expert)
        return known or super().found(expert, version)


class AnswersWithNewest(Replica):
    """Computes with the newest version that it has, whatever was asked for."""

    def found(self, expert: str, version: str) -> str | None:
        return max((held for id, held in self.slots if id == expert), default=None)


class DisobeysOrder(Replica):
    """Unloads although it has been asked to stage the same version since."""

    checks_stamps = False


class Unfenced(Registry):
    """Takes commits of a controller that was replaced."""

    fenced = False


class Backwards(Epochs):
    """Adopts whatever it is told."""

    def adopt(self, epoch: Epoch) -> bool:
        if epoch.number == self.number:
            return False
        self._known[epoch.number] = epoch
        self._current = epoch.number
        return True


class GoesBackwards(Router):
    """A router with such epochs."""

    def __init__(self, world: World, name: str, incarnation: str) -> None:
        super().__init__(world, name, incarnation)
        self.epochs = Backwards()


class BelievesOldViews(Router):
    """Takes a view that is older than the one it has."""

    checks_order = False


class TellsOfFencing(Controller):
    """Says that a swap was refused when it only knows that somebody else has taken over."""

    gives_up_in_silence = False


def _named(world: World, id: str) -> set[str]:
    return {versions[id] for versions in world.registry.epochs.values()}


@dataclass(frozen=True)
class Rule:
    """A broken rule, the promise that it breaks, and the kind of world that shows it soonest."""

    rules: Broken
    breach: str
    kind: str | None = None


RULES = {
    "flip before all receipts": Rule(Broken(control=_control_with(FlipsEarly)), "receipts"),
    "receipts of an incarnation that is gone": Rule(
        Broken(control=_control_with(CountsOldReceipts)), "receipts", "storm"
    ),
    "retire before drain": Rule(Broken(control=RetiresEarly), "no request fails"),
    "retire before routers were heard": Rule(
        Broken(control=ForgetsRoutersAtStart), "no request fails", "controller lost"
    ),
    "old reports believed": Rule(Broken(control=BelievesOldReports), "no request fails", "quiet"),
    "restarted without the pinned version": Rule(Broken(replica=PretendsToHold), "no mix"),
    "answers with the newest version": Rule(Broken(replica=AnswersWithNewest), "no mix"),
    "late unload obeyed": Rule(Broken(replica=DisobeysOrder), "receipts", "storm"),
    "no fencing": Rule(Broken(registry=Unfenced), "fencing", "storm"),
    "fencing taken for refusal": Rule(Broken(controller=TellsOfFencing), "refused changes nothing", "storm"),
    "router goes backwards": Rule(Broken(router=GoesBackwards), "routers only go forward"),
    "old views believed": Rule(Broken(router=BelievesOldViews), "no request fails", "quiet"),
}

"""Rules broken on purpose, one at a time: the checker must notice each, or it proves nothing."""

from __future__ import annotations

from collections.abc import Mapping

from sim.controller import Controller
from sim.registry import Registry
from sim.replica import Replica
from sim.router import Router
from sim.world import Broken, World

from expertmesh.cluster.control import Control, Order
from expertmesh.cluster.retention import Versions
from expertmesh.cluster.swap import Commit, Effect, MemberSeen, Phase, Swap, Swaps
from expertmesh.router.epochs import Epoch, Epochs


def _control_with(swap: type[Swap]) -> type[Control]:
    """A `Control` whose swaps are of another make."""

    class Others(Swaps):
        def begin(self, swap_id: str, ids: frozenset[str], draining: object = ()) -> Swap:
            super().begin(swap_id, ids, draining)  # type: ignore[arg-type]
            self._active[swap_id] = swap(swap_id, ids)
            return self._active[swap_id]

    class Changed(Control):
        def __init__(self) -> None:
            super().__init__()
            self.swaps = Others()

    return Changed


class FlipsEarly(Swap):
    """Commits as soon as every id has one receipt, whoever else still stages."""

    def _ready(self) -> list[Effect]:
        if self.phase is not Phase.STAGING or set(self.versions()) != self.ids:
            return []
        self.phase = Phase.COMMITTING
        return [Commit(self.versions())]


class CountsOldReceipts(Swap):
    """Keeps the receipts of a member that has restarted since."""

    def _member(self, event: MemberSeen) -> list[Effect]:
        kept = dict(self._receipts)
        effects = super()._member(event)
        self._receipts = {**kept, **self._receipts}
        return [*effects, *self._ready()]


class RetiresEarly(Control):
    """Does not look at pins before it unloads."""

    def _pinned(self) -> list[int]:
        return []


class ForgetsRoutersAtStart(Control):
    """Unloads after a restart although it does not know yet what routers pin."""

    def restore(self, epochs: Mapping[int, Versions], routers: object = ()) -> list[Order]:
        return super().restore(epochs)


class BelievesOldReports(Control):
    """Takes reports that are older than a receipt."""

    def mark(self, member: str) -> int:
        return 0


class ForgetsPinnedEpochs(Control):
    """Forgets epochs that the registry has collected, pinned or not."""

    def forget_epochs(self, kept: Mapping[int, Versions]) -> None:
        self.epochs = dict(kept)


class NeverAsksAgain(Swap):
    """Does not ask a member again that was lost and is back."""

    def _forget(self, member: str) -> None:
        asked = set(self._asked)
        super()._forget(member)
        self._asked = asked


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


class AnswersWithAny(Replica):
    """Computes with another version where the one asked for is not there."""

    def found(self, expert: str, version: str) -> str | None:
        held = sorted(v for id, v in self.slots if id == expert)
        return version if version in held else (held[0] if held else None)


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


RULES = {
    "flip before all receipts": Broken(control=_control_with(FlipsEarly)),
    "receipts of an incarnation that is gone": Broken(control=_control_with(CountsOldReceipts)),
    "a member that is back is not asked again": Broken(control=_control_with(NeverAsksAgain)),
    "retire before drain": Broken(control=RetiresEarly),
    "retire before routers were heard": Broken(control=ForgetsRoutersAtStart),
    "old reports believed": Broken(control=BelievesOldReports),
    "pinned epochs forgotten": Broken(control=ForgetsPinnedEpochs),
    "restarted without the pinned version": Broken(replica=PretendsToHold),
    "answers with any version": Broken(replica=AnswersWithAny),
    "late unload obeyed": Broken(replica=DisobeysOrder),
    "no fencing": Broken(registry=Unfenced),
    "fencing taken for refusal": Broken(controller=TellsOfFencing),
    "router goes backwards": Broken(router=GoesBackwards),
    "old views believed": Broken(router=BelievesOldViews),
}
"""The name of each broken rule, and the world's rules with it."""

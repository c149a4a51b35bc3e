"""Rules broken on purpose, one at a time: the checker must notice each, or it proves nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sim.controller import Transactions, Watched
from sim.disk import Registry
from sim.replica import Replica
from sim.router import Router
from sim.world import Broken, World

from expertmesh.cluster.control.events import Action, CommitSwap, MemberReported
from expertmesh.cluster.control.orders import Order, Orders
from expertmesh.cluster.control.reconciler import Reconciler
from expertmesh.cluster.control.replica_health import Health
from expertmesh.cluster.control.retention import Versions
from expertmesh.cluster.control.routers.leases import RouterLeases
from expertmesh.cluster.control.swap import Phase, Swap, Swaps
from expertmesh.cluster.state.registry import _transaction
from expertmesh.experts.errors import Aborted, Fenced
from expertmesh.router.epochs.epochs import Epoch, Epochs


def _swaps_of(swap: type[Swap]) -> type[Swaps]:
    """`Swaps` of another make."""

    class Others(Swaps):
        def begin(
            self,
            swap_id: str,
            ids: frozenset[str],
            draining: Collection[str] = (),
            new_code: frozenset[str] = frozenset(),
        ) -> Swap:
            super().begin(swap_id, ids, draining, new_code)
            self._active[swap_id] = swap(swap_id, ids, new_code)
            return self._active[swap_id]

    return Others


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


class ForgetsOffers(Reconciler):
    """Unloads an epoch that was recalled when its time is up, although a router still offers it."""

    def _by_number(self) -> set[int]:
        return set(self.recalled)


class OffersEarly(Reconciler):
    """Tells routers of a recalled epoch before it is loaded."""

    def known_to_routers(self) -> dict[int, Versions]:
        return {n: v for n, v in self.epochs.items() if n == self.current or n in self.recalled}


class DoesNotLookAgain(Reconciler):
    """Has unloaded what it once decided to, although it is needed again."""

    def begin_unload(self, member: str, incarnation: str, id: str, version: str) -> bool:
        super().begin_unload(member, incarnation, id, version)
        return True


class TellsBeforeItHasAsked(Health):
    """Tells routers of replicas that were never probed."""

    def all_asked(self) -> bool:
        return True


class BelievesReportsOnTheWay(Watched):
    """Takes reports that were made while an unload was under way."""

    def changed_since(self, member: str, moment: float) -> bool:
        return self._changed.get(member, 0.0) > moment


class BelievesOldReports(Watched):
    """Takes reports that are older than a receipt."""

    def changed_since(self, member: str, moment: float) -> bool:
        return False


class AllAtOnce(Watched):
    """Has a member do several things at once, so that one may overtake another."""

    async def _in_turn(self, member: str, work: Coroutine[Any, Any, None]) -> None:
        await work


class TakesSilenceForRefusal(Watched):
    """Gives a swap up when the disk does not say whether it is committed."""

    async def _decided(self, action: CommitSwap) -> tuple[int, Mapping[str, str]]:
        return self.transactions.commit(action.swap_id, action.versions)


class PretendsToHold(Replica):
    """After a restart it loads the current versions alone, reports all, and answers with what it has."""

    def __init__(self, world: World, name: str, incarnation: str, ids: tuple[str, ...]) -> None:
        super().__init__(world, name, incarnation, ids)
        if world.clock.now and world.disk.history:
            current = world.disk.history[world.disk.current]
            self.slots = {(id, version) for id in ids for version in _named(world, id)}
            self._has = {id: current[id] for id in ids}

    def found(self, expert: str, version: str) -> str | None:
        known = getattr(self, "_has", {}).get(expert)
        return known or super().found(expert, version)


class AnswersWithNewest(Replica):
    """Computes with the newest version that it has, whatever was asked for."""

    def found(self, expert: str, version: str) -> str | None:
        return max((held for id, held in self.slots if id == expert), default=None)


class AnswersWhoWasGivenUp(Replica):
    """Goes on to compute for routers that the controller has given up."""

    def refuse(self, given_up: Mapping[str, str]) -> None:
        """Refuses nobody."""


class ForgetsWhoIsSilent(RouterLeases):
    """Takes a router for gone once its lease is over, and tells nobody: it may be paused, and pins."""

    @property
    def given_up(self) -> dict[str, str]:
        return {}

    def leave(self, replicas: Iterable[str]) -> list[str]:
        return super().leave(())


class TakesLateOrders(Orders):
    """Unloads although a version was staged again since."""

    def may_unload(self, id: str, version: str, order: Order) -> bool:
        return True


class BelievesOldUpdates(Orders):
    """Takes an update that is older than the one it has."""

    def is_newest_update(self, order: Order) -> bool:
        return True


class ObeysAnybody(Orders):
    """Obeys a controller although another one has taken over."""

    def check(self, order: Order) -> None:
        """Obeys."""


class Unfenced(Registry):
    """Takes commits of a controller that was replaced."""

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._read() as db, _transaction(db):
            yield db


class CommitsOverOthers(Transactions):
    """Commits what it has staged, although another swap has replaced what it was to replace."""

    def expected(self, swap_id: str) -> dict[str, str | None]:
        return dict(self._requests[swap_id].expect)


class TellsOfFencing(Transactions):
    """Says that a swap was refused when it only knows that somebody else has taken over."""

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        try:
            return super().commit(swap_id, versions)
        except Fenced as error:
            raise Aborted(error.message) from None


class ForgetsDeclarations(Transactions):
    """Notes only later what a declaration has brought, so that a controller may die between the two."""

    def commit(self, swap_id: str, versions: Mapping[str, str]) -> tuple[int, Mapping[str, str]]:
        if swap_id in self._declarations:
            self._declarations[swap_id] = dict.fromkeys(self._declarations[swap_id], "")
        return super().commit(swap_id, versions)


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


def _named(world: World, id: str) -> set[str]:
    return {versions[id] for versions in world.disk.epochs.values()}


@dataclass(frozen=True)
class Rule:
    """A broken rule, the promise that it breaks, and the kind of world that shows it soonest, among so many seeds.

    Seeds before `first` do not show it: they are left out, because each takes a while.
    """

    rules: Broken
    breach: str
    kind: str | None = None
    seeds: int = 300
    first: int = 0


RULES = {
    "flip before all receipts": Rule(Broken(swaps=_swaps_of(FlipsEarly)), "receipts"),
    "receipts of an incarnation that is gone": Rule(
        Broken(swaps=_swaps_of(CountsOldReceipts)), "receipts", "storm", seeds=250, first=230
    ),
    "retire before drain": Rule(Broken(reconciler=RetiresEarly), "no request fails"),
    "retire before routers were heard": Rule(
        Broken(reconciler=ForgetsRoutersAtStart), "no request fails", "controller lost", seeds=140, first=120
    ),
    "old reports believed": Rule(Broken(executor=BelievesOldReports), "no request fails", "quiet"),
    "restarted without the pinned version": Rule(Broken(replica=PretendsToHold), "no mix"),
    "answers with the newest version": Rule(Broken(replica=AnswersWithNewest), "no mix"),
    "answers a router that was given up": Rule(
        Broken(replica=AnswersWhoWasGivenUp), "no stale answer", "storm", seeds=1140, first=1120
    ),
    "retired while a paused router pins it": Rule(
        Broken(leases=ForgetsWhoIsSilent), "what is pinned stays", "storm", seeds=300
    ),
    "late unload obeyed": Rule(Broken(orders=TakesLateOrders), "receipts", "quiet", seeds=1700, first=1680),
    "no fencing": Rule(Broken(registry=Unfenced), "fencing", "storm", seeds=540, first=520),
    "fencing taken for refusal": Rule(Broken(transactions=TellsOfFencing), "refused changes nothing", "storm"),
    "router goes backwards": Rule(Broken(router=GoesBackwards, orders=BelievesOldUpdates), "routers only go forward"),
    "old updates believed": Rule(Broken(orders=BelievesOldUpdates), "what is recalled is offered", "quiet"),
    "orders of a replaced controller obeyed": Rule(Broken(orders=ObeysAnybody), "members obey the newest", "storm"),
    "silence of the disk taken for refusal": Rule(
        Broken(executor=TakesSilenceForRefusal), "no request fails", "one replica lost"
    ),
    "several things at once at a member": Rule(
        Broken(executor=AllAtOnce, orders=TakesLateOrders), "receipts", "quiet", seeds=1080, first=1060
    ),
    "unloaded while it is offered": Rule(
        Broken(reconciler=ForgetsOffers), "no request fails", "quiet", seeds=610, first=590
    ),
    "offered before it is loaded": Rule(Broken(reconciler=OffersEarly), "no request fails", "quiet"),
    "unloaded although it is needed again": Rule(Broken(reconciler=DoesNotLookAgain), "no request fails", "quiet"),
    "replicas told of before they were asked": Rule(
        Broken(health=TellsBeforeItHasAsked), "no request fails", "controller lost", seeds=540, first=520
    ),
    "reports of the time of an unload believed": Rule(
        Broken(executor=BelievesReportsOnTheWay), "no request fails", "quiet", seeds=630, first=610
    ),
    "committed over another swap": Rule(Broken(transactions=CommitsOverOthers), "no update is lost", seeds=600),
    "what a declaration has brought is forgotten": Rule(Broken(transactions=ForgetsDeclarations), "no third state"),
}

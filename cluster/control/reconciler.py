"""All that the controller decides: who loads what, when a swap goes on, what may be forgotten. Reports in, actions out.

It is level-triggered: every report of a replica or router is compared with what has to be, so it does not matter which
of them restarted or which message was lost. No clock, no torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...experts.errors import Aborted, ExpertMeshError
from ...experts.names import GATE, is_layer_id
from .events import (
    Action,
    CommitRefused,
    Committed,
    DiedStaging,
    Event,
    LoadVersion,
    MemberGone,
    MemberReported,
    NotReached,
    RouterGone,
    RouterReported,
    Staged,
    StageRefused,
    Sync,
    TimeUp,
    UnloadVersion,
)
from .retention import Versions, epochs_in_use, unneeded, wanted
from .swap import Phase, Swap, Swaps

UNKNOWN = -1
"""Stands for the oldest pinned epoch of a router that has not reported yet."""


@dataclass
class _Member:
    incarnation: str
    ids: frozenset[str]
    holds: frozenset[tuple[str, str]]
    asked: set[tuple[str, str]] = field(default_factory=set)
    leaving: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class _Router:
    epoch: int
    oldest_pinned: int


class Reconciler:
    """What is known of members, routers, epochs and swaps, and what follows from it.

    Members are replicas, and routers as holders of gates and layers. `epochs` are those that the registry
    keeps; ids of them that are not `declared` any more are nobody's to hold.
    """

    def __init__(self) -> None:
        self.epochs: dict[int, Versions] = {}
        self.current = 0
        self.declared: frozenset[str] = frozenset()
        self.recalled: set[int] = set()
        self.swaps = Swaps()
        self._members: dict[str, _Member] = {}
        self._routers: dict[str, _Router] = {}
        self._offered: dict[str, frozenset[int]] = {}

    def restore(self, epochs: Mapping[int, Versions], routers: Collection[str] = ()) -> list[Action]:
        """Begin with the epochs of the registry, the newest of which is the current one.

        `routers` are those that may serve requests: nothing is unloaded, and no swap flips, before each of them has
        reported or was lost, since nobody else knows what it pins.
        """
        self.epochs = dict(epochs)
        self.current = max(self.epochs, default=0)
        for router in routers:
            self._routers.setdefault(router, _Router(0, UNKNOWN))
        return self._reconcile()

    def forget_epochs(self, kept: Mapping[int, Versions]) -> None:
        """Keep only these epochs, and those in use: the registry has collected the others."""
        floor = min([self.current, *self._pinned()])
        used = {n: v for n, v in self.epochs.items() if n >= floor or n in self._by_number()}
        self.epochs = {**used, **kept}
        self.recalled &= set(self.epochs)

    def oldest_needed(self) -> int:
        """The oldest epoch that is current, pinned, recalled or perhaps pinned: the registry must not collect it."""
        return max(min([self.current, *self._pinned(), *self._by_number()]), min(self.epochs, default=0))

    def members(self) -> dict[str, str]:
        """The live members and their incarnations."""
        return {name: member.incarnation for name, member in self._members.items()}

    def member_reported(
        self, member: str, incarnation: str, ids: frozenset[str], holds: frozenset[tuple[str, str]]
    ) -> list[Action]:
        """A live member says what it is for and what it holds. What has to serve is loaded before what may serve."""
        known = self._members.get(member)
        if known is None or known.incarnation != incarnation:
            known = self._members[member] = _Member(incarnation, ids, holds)
        known.ids, known.holds = ids, holds
        known.asked -= holds
        return [*self._reconcile([member]), *self._tell(MemberReported(member, incarnation, ids))]

    def member_lost(self, member: str) -> list[Action]:
        """A member does not answer any more, or is not wanted any more."""
        self._members.pop(member, None)
        return self._tell(MemberGone(member))

    def router_joined(self, router: str, *, fresh: bool) -> list[Action]:
        """A router follows from now on: no swap ends before it has adopted its epoch.

        Unless it is `fresh`, and has served nothing yet, it may pin any epoch until it has reported.
        """
        known = self._routers.setdefault(router, _Router(0, self.current if fresh else UNKNOWN))
        return self._tell(RouterReported(router, known.epoch, known.oldest_pinned))

    def router_told(self, router: str, epochs: Collection[int]) -> None:
        """A router is about to be told these epochs: from now on requests there may pin them by number."""
        self._offered[router] = self._offered.get(router, frozenset()) | frozenset(epochs)

    def router_reported(
        self, router: str, epoch: int, oldest_pinned: int, told: Collection[int] | None = None
    ) -> list[Action]:
        """A router says which epoch it has adopted, and the oldest that is pinned there.

        `told` are the epochs that it was told, and has taken, before it said so: it offers no others any more.
        """
        if told is not None:
            self._offered[router] = frozenset(told)
        self._routers[router] = _Router(epoch, oldest_pinned if epoch else self.current)
        return [*self._tell(RouterReported(router, epoch, oldest_pinned)), *self._reconcile()]

    def router_lost(self, router: str) -> list[Action]:
        """A router was not heard for too long, or another incarnation of it has taken its place."""
        self._routers.pop(router, None)
        self._offered.pop(router, None)
        return [*self._tell(RouterGone(router)), *self._reconcile()]

    def swap_asked(self, swap_id: str, ids: frozenset[str], new_code: frozenset[str] = frozenset()) -> list[Action]:
        """Begin a swap of these ids, some perhaps with new code; one that is under way just goes on.

        New code is staged by one member first if the others serve an older version meanwhile.

        Raises Aborted where an id is being swapped already, or an older version of it may still be pinned.
        """
        if self.swaps.find(swap_id) is not None:
            return []
        serving = self.epochs.get(self.current, {}).keys()
        swap = self.swaps.begin(swap_id, ids, self._draining(ids), new_code & serving)
        actions: list[Action] = []
        for name, router in self._routers.items():
            actions += self._tell_swap(swap, RouterReported(name, router.epoch, router.oldest_pinned))
        for name, member in self._members.items():
            actions += self._tell_swap(swap, MemberReported(name, member.incarnation, member.ids))
        return actions

    def staged(self, swap_id: str, member: str, incarnation: str, id: str, version: str) -> list[Action]:
        """A member's receipt for a candidate."""
        known = self._members.get(member)
        if known is not None and known.incarnation == incarnation:
            known.holds |= {(id, version)}
        return self._tell(Staged(member, incarnation, id, version), swap_id)

    def stage_refused(
        self, swap_id: str, member: str, incarnation: str, id: str, error: ExpertMeshError
    ) -> list[Action]:
        """A member could not stage or verify a candidate."""
        return [*self._tell(StageRefused(member, incarnation, id, error), swap_id), *self._reconcile()]

    def died_staging(self, swap_id: str, member: str, id: str) -> list[Action]:
        """A member's process ended while it staged a candidate: another try would end the next one, too."""
        return [*self._tell(DiedStaging(member, id), swap_id), *self.member_lost(member), *self._reconcile()]

    def not_reached(self, swap_id: str, member: str, id: str) -> list[Action]:
        """A member was gone before it could stage a candidate; its next incarnation is asked anew."""
        return [*self.member_lost(member), *self._tell(NotReached(member, id), swap_id)]

    def loaded(self, member: str, incarnation: str, id: str, version: str) -> list[Action]:
        """A member holds a committed version that it was asked to load."""
        known = self._members.get(member)
        if known is None or known.incarnation != incarnation:
            return []
        known.holds |= {(id, version)}
        known.asked.discard((id, version))
        return [Sync()]

    def load_failed(self, member: str, incarnation: str, id: str, version: str) -> None:
        """A member could not load a version; its next report leads to another try."""
        known = self._members.get(member)
        if known is not None and known.incarnation == incarnation:
            known.asked.discard((id, version))

    def committed(self, swap_id: str, epoch: int, versions: Versions) -> list[Action]:
        """The registry has made the epoch durable: from now on it is the current one."""
        self.epochs[epoch] = versions
        self.current = max(self.current, epoch)
        return [Sync(), *self._tell(Committed(epoch), swap_id)]

    def commit_refused(self, swap_id: str, error: ExpertMeshError) -> list[Action]:
        """The registry has refused; nothing has changed."""
        return [*self._tell(CommitRefused(error), swap_id), *self._reconcile()]

    def time_up(self, swap_id: str) -> list[Action]:
        """A swap has taken too long to be staged."""
        return [*self._tell(TimeUp(), swap_id), *self._reconcile()]

    def recall(self, epoch: int) -> list[Action]:
        """Load the versions of an epoch that is kept, beside the current ones. `release` ends it."""
        self.recalled.add(epoch)
        return [Sync(), *self._reconcile()]

    def release(self, epoch: int) -> list[Action]:
        """An epoch that was recalled is not needed any more, once no router offers it."""
        self.recalled.discard(epoch)
        return [Sync(), *self._reconcile()]

    def in_use(self) -> list[Versions]:
        """The epochs whose versions must stay loaded."""
        pinned = [oldest for oldest in self._pinned() if oldest != UNKNOWN]
        return epochs_in_use(self.epochs, self.current, pinned, self._by_number())

    def used(self) -> frozenset[str]:
        """The ids that an epoch in use names; of all epochs, where it is not known what a router pins."""
        unknown = self._blind() or UNKNOWN in self._pinned()
        return frozenset(id for versions in (self.epochs.values() if unknown else self.in_use()) for id in versions)

    def check_unused(self, ids: frozenset[str]) -> None:
        """Raise Aborted where a request may need one of these after all: since the owner has looked at what is `used`,
        an epoch may have been recalled."""
        if needed := sorted(ids & self.used()):
            raise Aborted(f"{needed[0]}: a request may still need it; its replicas are ended later")

    def structure(self) -> frozenset[str]:
        """The ids that routers hold: of each layer in an epoch in use, and of its gate."""
        layers = {id for versions in self.in_use() for id in versions if is_layer_id(id)}
        return frozenset(layers | {id.partition("/")[0] + f"/{GATE}" for id in layers})

    def known_to_routers(self) -> dict[int, Versions]:
        """The epochs that routers are told: the current one, and those recalled that are loaded."""
        return {
            n: v for n, v in self.epochs.items() if n == self.current or (n in self.recalled and not self.lacking(n))
        }

    def begin_unload(self, member: str, incarnation: str, id: str, version: str) -> bool:
        """Look once more, right before a member is told to unload a version, whether it still may.

        If so, the version counts as gone from now on.
        """
        known, pair = self._members.get(member), (id, version)
        if known is None or known.incarnation != incarnation:
            return False
        known.leaving.discard(pair)
        if self._blind() or not unneeded([pair], wanted(known.ids, self.in_use()), self._staging()):
            return False
        known.holds -= {pair}
        known.asked.discard(pair)  # or what is needed once more would not be asked for again
        return True

    def lacking(self, epoch: int) -> list[tuple[str, str]]:
        """The (id, version) of an epoch that no live replica holds, or, of gates, that a router does not.

        What is neither declared nor somebody's to hold does not count.
        """
        held = {pair for member in self._members.values() for pair in member.holds}
        known = self.declared.union(*(member.ids for member in self._members.values()))
        routers = [member for name, member in self._members.items() if name in self._routers]
        return [
            pair
            for pair in self.epochs.get(epoch, {}).items()
            if pair[0] in known
            and (pair not in held or any(pair[0] in router.ids and pair not in router.holds for router in routers))
        ]

    def serving(self) -> dict[str, str]:
        """The versions of the current epoch that are declared."""
        return {id: version for id, version in self.epochs.get(self.current, {}).items() if id in self.declared}

    def incomplete(self) -> list[tuple[str, str, str]]:
        """The (member, id, version) of the current epoch that a live member does not hold."""
        current = [self.epochs[self.current]] if self.current else []
        return [
            (name, *pair)
            for name, member in self._members.items()
            for pair in sorted(wanted(member.ids, current) - member.holds)
        ]

    def _tell(self, event: Event, swap_id: str | None = None) -> list[Action]:
        told = [self.swaps.find(swap_id)] if swap_id is not None else self.swaps.active()
        return [action for swap in told if swap is not None for action in self._tell_swap(swap, event)]

    def _tell_swap(self, swap: Swap, event: Event) -> list[Action]:
        actions = swap.on(event)
        if swap.phase is Phase.DONE or swap.phase is Phase.ABORTED:
            actions += self._reconcile()
        return actions

    def _pinned(self) -> list[int]:
        return [router.oldest_pinned for router in self._routers.values()]

    def _by_number(self) -> set[int]:
        """The epochs that a request may pin by their number, now or soon."""
        return self.recalled.union(*self._offered.values())

    def _staging(self) -> frozenset[str]:
        """The ids of which a swap may have candidates loaded that are in no epoch yet."""
        return frozenset(id for swap in self.swaps.active() if swap.phase is not Phase.RETIRING for id in swap.ids)

    def _blind(self) -> bool:
        """Whether a router may pin an epoch whose versions are not known here: then nothing may be unloaded."""
        return any(oldest < min(self.epochs, default=0) for oldest in self._pinned())

    def _draining(self, ids: frozenset[str]) -> list[str]:
        """The ids of which a request may still need another version than the current one."""
        current = self.epochs.get(self.current, {})
        floor = min([self.current, *self._pinned()])
        older = [versions for number, versions in self.epochs.items() if number >= floor]
        return sorted(id for id in ids if self._blind() or any(v.get(id) != current.get(id) for v in older))

    def _reconcile(self, names: Collection[str] | None = None) -> list[Action]:
        """Compare what members hold with what they have to hold; all members, if none is named."""
        in_use, may_unload, staging = self.in_use(), not self._blind(), self._staging()
        actions: list[Action] = []
        for name in self._members if names is None else names:
            member = self._members[name]
            needed = wanted(member.ids, in_use)
            missing = sorted(needed - member.holds - member.asked)
            member.asked.update(missing)
            surplus = unneeded(member.holds - member.leaving, needed, staging) if may_unload else []
            member.leaving.update(surplus)
            actions += [LoadVersion(name, member.incarnation, *pair) for pair in missing]
            actions += [UnloadVersion(name, member.incarnation, *pair) for pair in surplus]
        return actions


def refuse_unless_current(expect: Mapping[str, str], current: Versions) -> None:
    """Compare what a caller expects with the current epoch, before anything is staged. Raises Aborted."""
    for id, version in expect.items():
        found = current.get(id, "nothing")
        if found != version:
            raise Aborted(f"{id} is at {found}, not at {version} as expected: look at its history, then decide anew")

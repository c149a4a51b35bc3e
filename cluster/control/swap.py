"""One swap as a state machine: stage, verify, commit, flip, retire. Events in, actions out; no clock, torch or Ray.

A **member** is whoever has to hold a candidate before it may be committed: every live replica of the expert, every live
router for a gate. Members are known by their incarnation: a receipt of one that has restarted since counts for nothing.

    STAGING ──every live member sent receipts──> COMMITTING ──durable──> FLIPPING ──all routers──> RETIRING ──> DONE
       │ a member refuses, or time is up              │ the registry refuses
       └──────────────────> ABORTED <─────────────────┘

Events may come late, twice or in another order; each action may be carried out twice. The point of no return is the
registry's transaction, whose outcome alone decides between ABORTED and the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from ...experts.errors import Aborted, DeadlineExceeded, ExpertMeshError, FailedPrecondition
from .events import (
    Action,
    CommitRefused,
    CommitSwap,
    Committed,
    DiedStaging,
    Event,
    FinishSwap,
    MemberGone,
    MemberReported,
    NotReached,
    RouterGone,
    RouterReported,
    StageCandidate,
    Staged,
    StageRefused,
    Sync,
)


class Phase(Enum):
    """Where a swap stands."""

    STAGING = "staging"
    COMMITTING = "committing"
    FLIPPING = "flipping"
    RETIRING = "retiring"
    DONE = "done"
    ABORTED = "aborted"


@dataclass
class Swap:
    """The state of one swap of one or several ids (experts and gates) at once.

    Candidates of `new_code`, which may end the process that builds them, are staged by one member before the others.
    """

    swap_id: str
    ids: frozenset[str]
    new_code: frozenset[str] = frozenset()
    phase: Phase = Phase.STAGING
    epoch: int | None = None
    error: ExpertMeshError | None = None
    history: list[str] = field(default_factory=list)
    _members: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)
    _asked: set[tuple[str, str, str]] = field(default_factory=set)
    _receipts: dict[tuple[str, str], str] = field(default_factory=dict)
    _routers: dict[str, tuple[int, int]] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)

    def on(self, event: Event) -> list[Action]:
        """Take one event; returns what is to be done now."""
        before = self.phase
        actions = self._take(event)
        if self.phase is not before:
            self.history.append(f"{type(event).__name__}: {before.value} -> {self.phase.value}")
        return actions

    def versions(self) -> dict[str, str]:
        """The version of every id that has receipts."""
        return {id: version for (_, id), version in self._receipts.items()}

    def receipts(self) -> tuple[int, int]:
        """How many receipts there are, and how many are needed as far as is known."""
        return len(self._receipts), sum(len(ids) for _, ids in self._members.values())

    def _take(self, event: Event) -> list[Action]:
        if isinstance(event, MemberReported):
            return self._member(event)
        if isinstance(event, MemberGone):
            self._forget(event.member)
            return self._ready()
        if isinstance(event, Staged):
            return self._receipt(event)
        if isinstance(event, StageRefused):
            current = self._members.get(event.member, ("", frozenset()))[0]
            return self._abort(event.error) if event.incarnation == current else []
        if isinstance(event, DiedStaging):
            return self._abort(_deadly(event))
        if isinstance(event, NotReached):
            if self._first.get(event.id, "") == event.member:
                del self._first[event.id]
            return self._stage()
        if isinstance(event, Committed):
            return self._committed(event.epoch)
        if isinstance(event, CommitRefused):
            return self._abort(event.error, Phase.COMMITTING)
        if isinstance(event, RouterReported):
            self._routers[event.router] = (event.epoch, event.oldest_pinned)
            return self._flipped()
        if isinstance(event, RouterGone):
            self._routers.pop(event.router, None)
            return self._flipped()
        return self._abort(DeadlineExceeded(f"the swap was not staged in time: {self._waiting_for()}"))

    def _member(self, event: MemberReported) -> list[Action]:
        ids = event.ids & self.ids
        known = self._members.get(event.member)
        if known is None or known[0] != event.incarnation:
            self._forget(event.member)
            self._first = {id: member for id, member in self._first.items() if member != event.member}
        if ids:
            self._members[event.member] = (event.incarnation, ids)
        return [*self._stage(), *self._ready()]

    def _stage(self) -> list[Action]:
        """Ask every member that has not been asked for its candidates, except for those that another tries first.

        Who was lost while it tried is waited for: what became of it says whether another may try.
        """
        actions: list[Action] = []
        if self.phase is not Phase.STAGING:
            return actions
        for member, (incarnation, ids) in self._members.items():
            for id in sorted(ids):
                untried = id in self.new_code and id not in self.versions()
                if (member, incarnation, id) in self._asked or (untried and id in self._first):
                    continue
                if untried:
                    self._first[id] = member
                self._asked.add((member, incarnation, id))
                actions.append(StageCandidate(member, incarnation, self.swap_id, id))
        return actions

    def _receipt(self, event: Staged) -> list[Action]:
        incarnation, ids = self._members.get(event.member, ("", frozenset[str]()))
        if self.phase is not Phase.STAGING or event.incarnation != incarnation or event.id not in ids:
            return []
        other = self.versions().get(event.id, event.version)
        if other != event.version:
            message = (
                f"replicas of {event.id} staged different versions ({other}, {event.version}): same code everywhere?"
            )
            return self._abort(FailedPrecondition(message))
        self._receipts[event.member, event.id] = event.version
        return [*self._stage(), *self._ready()]

    def _ready(self) -> list[Action]:
        """Commit when every live member has sent a receipt for each of its ids, and no id is without one."""
        if self.phase is not Phase.STAGING or set(self.versions()) != self.ids:
            return []
        needed = {(member, id) for member, (_, ids) in self._members.items() for id in ids}
        if not needed <= self._receipts.keys():
            return []
        self.phase = Phase.COMMITTING
        return [CommitSwap(self.swap_id, self.versions())]

    def _committed(self, epoch: int) -> list[Action]:
        if self.phase is not Phase.COMMITTING:
            return []
        self.phase, self.epoch = Phase.FLIPPING, epoch
        return [Sync(), *self._flipped()]

    def _flipped(self) -> list[Action]:
        """Finish when all routers have adopted the epoch; done when none pins an older one."""
        actions: list[Action] = []
        if self.epoch is None or not self._routers:
            return actions
        if self.phase is Phase.FLIPPING and all(epoch >= self.epoch for epoch, _ in self._routers.values()):
            self.phase = Phase.RETIRING
            actions.append(FinishSwap(self.swap_id, self.epoch))
        if self.phase is Phase.RETIRING and all(oldest >= self.epoch for _, oldest in self._routers.values()):
            self.phase = Phase.DONE
        return actions

    def _abort(self, error: ExpertMeshError, allowed: Phase = Phase.STAGING) -> list[Action]:
        if self.phase is not allowed:
            return []
        self.phase, self.error = Phase.ABORTED, error
        return [FinishSwap(self.swap_id, None, error)]

    def _forget(self, member: str) -> None:
        self._members.pop(member, None)
        self._asked = {asked for asked in self._asked if asked[0] != member}
        self._receipts = {key: version for key, version in self._receipts.items() if key[0] != member}

    def _waiting_for(self) -> str:
        needed = [(member, id) for member, (_, ids) in self._members.items() for id in sorted(ids)]
        missing = [f"{member} for {id}" for member, id in needed if (member, id) not in self._receipts]
        lonely = [f"any replica of {id}" for id in sorted(self.ids - {id for _, id in needed})]
        return ", ".join((missing + lonely)[:3]) or "the registry"


def _deadly(event: DiedStaging) -> FailedPrecondition:
    return FailedPrecondition(
        f"{event.id}: the process of {event.member} ended while it built the new version: its constructor or its code "
        "ended it, or it ran out of memory; see the log, and swap it again only if the process was killed from outside"
    )


class Swaps:
    """All swaps that are under way; at most one candidate or draining version of an id at a time."""

    def __init__(self) -> None:
        self._active: dict[str, Swap] = {}

    def begin(
        self,
        swap_id: str,
        ids: frozenset[str],
        draining: Collection[str] = (),
        new_code: frozenset[str] = frozenset(),
    ) -> Swap:
        """Start a swap. Raises Aborted where another one still stages, or drains, a version of one of its ids.

        `draining` are ids that drain although no swap is known that left them so: a controller before this one did it.
        """
        for other in self.active():
            for id in sorted(other.ids & ids):
                if other.phase is Phase.RETIRING:
                    raise Aborted(f"{id}: the previous swap is still draining; retry in a moment")
                raise Aborted(f"{id}: another swap ({other.swap_id}) is under way; look at its result, then retry")
        for id in sorted(ids & set(draining)):
            raise Aborted(f"{id}: the previous swap is still draining; retry in a moment")
        swap = self._active[swap_id] = Swap(swap_id, ids, new_code)
        return swap

    def find(self, swap_id: str) -> Swap | None:
        """A swap that is under way, by its id."""
        return self._active.get(swap_id)

    def active(self) -> list[Swap]:
        """The swaps that are neither done nor aborted; the others are forgotten."""
        ended = (Phase.DONE, Phase.ABORTED)
        self._active = {key: swap for key, swap in self._active.items() if swap.phase not in ended}
        return list(self._active.values())

    def draining(self) -> bool:
        """Whether a router may still have to adopt, or pin something older than, what a swap has committed."""
        return any(swap.phase in (Phase.FLIPPING, Phase.RETIRING) for swap in self.active())

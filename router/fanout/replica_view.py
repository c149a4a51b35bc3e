"""The view: the live replicas, their incarnations and versions, and the choice among them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ...experts.errors import Unavailable, VersionGone

READY = "ready"
DRAINING = "draining"
GONE = ("restarting", "waiting")
"""The states of a replica whose process has ended."""

SUSPECT_REPORTS = 2
"""The ready reports that a failed replica needs to be chosen again; the first may have been sent before it failed."""


@dataclass(frozen=True)
class Replica:
    """The state of one replica: its experts, the (expert, version) pairs that it holds, where it runs.

    `state` is "ready", or why it is not chosen: "starting", "restarting", "waiting" (no node has what it reserves),
    "unresponsive", "hung" (an expert does not return), "draining" (it is about to be ended) or, after a failure,
    "suspect"; `problem` says more. `address` is where its channel listens, empty if it has none, and `tcp_address`
    where it does so for routers on other nodes, if not there.
    """

    id: str
    experts: tuple[str, ...] = ()
    incarnation: str = ""
    holds: frozenset[tuple[str, str]] = frozenset()
    state: str = "starting"
    node: str = ""
    pid: int = 0
    device: str = "cpu"
    problem: str = ""
    address: str = ""
    tcp_address: str = ""


@dataclass
class _Entry:
    replica: Replica
    suspect: int = 0
    late: bool = False


class View:
    """A router's soft state of the live replicas. It is never durable and never part of an epoch."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._entries: dict[str, _Entry] = {}
        self._rng = rng or random.Random()
        self._by_version: dict[tuple[str, str], tuple[str, ...]] = {}
        self._rows: dict[str, int] = {}  # also of removed replicas with rows in flight

    def update(self, replicas: Iterable[Replica]) -> None:
        """Take a full report of the replicas; those that it does not name are removed."""
        entries: dict[str, _Entry] = {}
        for replica in replicas:
            entry = self._entries.get(replica.id)
            suspect, late = 0, False
            if entry is not None and entry.replica.incarnation == replica.incarnation:
                suspect = max(0, entry.suspect - 1) if replica.state == READY else entry.suspect
                late = entry.late
            entries[replica.id] = _Entry(replica, suspect, late)
        self._entries = entries
        self._index()

    def failed(self, replica_id: str) -> None:
        """Mark a replica as suspect: it is not chosen until `SUSPECT_REPORTS` ready reports, or a new incarnation."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.suspect = SUSPECT_REPORTS

    def late(self, replica_id: str) -> None:
        """Mark a replica as late: while others can be chosen it is not, until it has answered."""
        if replica_id in self._entries:
            self._entries[replica_id].late = True

    def answered(self, replica_id: str) -> None:
        """A late replica has caught up, or is gone."""
        if replica_id in self._entries:
            self._entries[replica_id].late = False

    def has_other(self, pairs: Sequence[tuple[str, str]], exclude: Collection[str]) -> bool:
        """Whether a replica that is not late holds all these (expert, version) pairs, apart from `exclude`."""
        return any(not self._entries[name].late for name in self._usable(pairs, exclude))

    def choose(self, pairs: Sequence[tuple[str, str]], *, exclude: Collection[str] = ()) -> Replica:
        """Choose a replica that holds all these (expert, version) pairs: the less busy of two drawn at random.

        One that is late is chosen only where there is no other.

        Raises Unavailable if all holders are suspect or excluded, or no replica of an expert is ready, and VersionGone
        if the ready replicas of an expert hold other versions only.
        """
        usable = self._usable(pairs, exclude)
        usable = [name for name in usable if not self._entries[name].late] or usable
        if not usable:
            for expert, version in pairs:
                if (expert, version) not in self._by_version:
                    raise self._no_holder(expert, version)
            raise Unavailable(f"every replica of {pairs[0][0]} is down or restarting; retry in a moment")
        if len(usable) == 1:
            return self._entries[usable[0]].replica
        drawn = self._rng.sample(usable, 2)  # in random order, so that ties alternate
        return self._entries[min(drawn, key=lambda name: self._rows.get(name, 0))].replica

    def first(self, expert: str) -> Replica:
        """The first replica of an expert, by id, that can be chosen now: the one that trains it. Raises Unavailable."""
        return self.ready(expert)[0]

    def ready(self, expert: str) -> list[Replica]:
        """The replicas of an expert that can be chosen now, by id, at least one. Raises Unavailable."""
        entries = (self._entries[name] for name in sorted(self._entries))
        found = [
            entry.replica
            for entry in entries
            if expert in entry.replica.experts and entry.replica.state == READY and not entry.suspect
        ]
        if not found:
            raise Unavailable(f"no replica of {expert} is ready; retry in a moment")
        return found

    def holds(self, replica_id: str, expert: str, version: str) -> bool:
        """Whether a replica holds this version and can be chosen now."""
        return replica_id in self._by_version.get((expert, version), ()) and not self._entries[replica_id].suspect

    def serves(self, expert: str, version: str) -> bool:
        """Whether any replica that holds this version can be chosen now; safe to call from another thread."""
        entries = [self._entries.get(name) for name in self._by_version.get((expert, version), ())]
        return any(entry is not None and not entry.suspect for entry in entries)

    def sent(self, replica_id: str, rows: int) -> None:
        """Add to the rows in flight to a replica; a negative number subtracts."""
        remaining = self._rows.pop(replica_id, 0) + rows
        if remaining:
            self._rows[replica_id] = remaining

    def replicas(self) -> list[Replica]:
        """All replicas; the state of a ready one that failed recently is "suspect"."""
        return [
            replace(entry.replica, state="suspect") if entry.suspect and entry.replica.state == READY else entry.replica
            for entry in self._entries.values()
        ]

    def rows_in_flight(self) -> dict[str, int]:
        """Rows in flight to each replica."""
        return {name: self._rows.get(name, 0) for name in self._entries}

    def busy(self) -> frozenset[str]:
        """The replicas with rows in flight, also those that were removed."""
        return frozenset(self._rows)

    def _usable(self, pairs: Sequence[tuple[str, str]], exclude: Collection[str]) -> list[str]:
        holders = self._by_version.get(pairs[0], ())
        for pair in pairs[1:]:
            others = self._by_version.get(pair, ())
            holders = tuple(name for name in holders if name in others) if others is not holders else holders
        return [name for name in holders if self._entries[name].suspect == 0 and name not in exclude]

    def _no_holder(self, expert: str, version: str) -> Unavailable | VersionGone:
        if any(other == expert for other, _ in self._by_version):
            return VersionGone(f"no replica holds {expert} {version} any more")
        problems = {entry.replica.problem for entry in self._entries.values() if expert in entry.replica.experts}
        why = "; ".join(sorted(problems - {""}))
        return Unavailable(f"no replica of {expert} is ready{why and f' ({why})'}; retry in a moment")

    def _index(self) -> None:
        index: dict[tuple[str, str], list[str]] = {}
        for name, entry in self._entries.items():
            if entry.replica.state == READY:
                for pair in entry.replica.holds:
                    index.setdefault(pair, []).append(name)
        self._by_version = {pair: tuple(names) for pair, names in index.items()}

"""The view: which incarnation of which replica holds which version, and the choice among them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ...experts.errors import Unavailable, VersionGone

READY = "ready"
SUSPECT_REPORTS = 2
"""How many ready reports a replica that failed needs before it is chosen again: one may have been under way."""


@dataclass(frozen=True)
class Replica:
    """What is known of one replica: the experts it is for, the (expert, version) pairs it holds, where it runs.

    `state` is "ready", or why it is not chosen: "starting", "restarting" or "unresponsive". `address` is where its
    channel listens, empty where it has none.
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


@dataclass
class _Entry:
    replica: Replica
    suspect: int = 0


class View:
    """A router's soft knowledge of live replicas. It is never durable and never part of an epoch."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._entries: dict[str, _Entry] = {}
        self._rng = rng or random.Random()
        self._by_version: dict[tuple[str, str], tuple[str, ...]] = {}
        self._rows: dict[str, int] = {}  # also of replicas that are forgotten while rows are under way to them

    def update(self, replicas: Iterable[Replica]) -> None:
        """Take a full report of all replicas; those that it does not name are forgotten."""
        entries: dict[str, _Entry] = {}
        for replica in replicas:
            entry = self._entries.get(replica.id)
            suspect = 0
            if entry is not None and entry.replica.incarnation == replica.incarnation:
                suspect = max(0, entry.suspect - 1) if replica.state == READY else entry.suspect
            entries[replica.id] = _Entry(replica, suspect)
        self._entries = entries
        self._index()

    def failed(self, replica_id: str) -> None:
        """Note that a replica did not answer: it is not chosen until it is reported ready again."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.suspect = SUSPECT_REPORTS

    def choose(self, wanted: Sequence[tuple[str, str]], *, exclude: Collection[str] = ()) -> Replica:
        """Choose a replica that holds all of some (expert, version) pairs: the less busy of two drawn at random.

        Raises Unavailable when those that hold them are down or excluded, VersionGone when none holds one of them.
        """
        holders = self._by_version.get(wanted[0], ())
        for held in wanted[1:]:
            others = self._by_version.get(held, ())
            holders = tuple(name for name in holders if name in others) if others is not holders else holders
        for expert, version in wanted:
            if (expert, version) not in self._by_version:
                raise self._gone(expert, version)
        usable = [name for name in holders if self._entries[name].suspect == 0 and name not in exclude]
        if not usable:
            raise Unavailable(f"every replica of {wanted[0][0]} is down or restarting; retry in a moment")
        if len(usable) == 1:
            return self._entries[usable[0]].replica
        drawn = self._rng.sample(usable, 2)  # in random order, so that equals take turns
        return self._entries[min(drawn, key=lambda name: self._rows.get(name, 0))].replica

    def holds(self, replica_id: str, expert: str, version: str) -> bool:
        """Whether a replica that may be chosen now holds this version."""
        return replica_id in self._by_version.get((expert, version), ()) and not self._entries[replica_id].suspect

    def sent(self, replica_id: str, rows: int) -> None:
        """Note rows that are on their way to a replica; give them back with a negative number."""
        left = self._rows.pop(replica_id, 0) + rows
        if left:
            self._rows[replica_id] = left

    def replicas(self) -> list[Replica]:
        """Every replica, those that failed lately marked "suspect"."""
        return [
            replace(entry.replica, state="suspect") if entry.suspect and entry.replica.state == READY else entry.replica
            for entry in self._entries.values()
        ]

    def rows_in_flight(self) -> dict[str, int]:
        """Rows under way to each replica."""
        return {name: self._rows.get(name, 0) for name in self._entries}

    def _gone(self, expert: str, version: str) -> Unavailable | VersionGone:
        if any(held == expert for held, _ in self._by_version):
            return VersionGone(f"no replica holds {expert} {version} any more")
        return Unavailable(f"no replica of {expert} is ready; retry in a moment")

    def _index(self) -> None:
        index: dict[tuple[str, str], list[str]] = {}
        for name, entry in self._entries.items():
            if entry.replica.state == READY:
                for held in entry.replica.holds:
                    index.setdefault(held, []).append(name)
        self._by_version = {held: tuple(names) for held, names in index.items()}

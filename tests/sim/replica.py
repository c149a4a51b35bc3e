"""A replica: holds versions in slots, computes for exactly the version asked, or refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.network import Process, Reply

from expertmesh.experts.errors import FailedPrecondition, VersionGone

if TYPE_CHECKING:
    from sim.world import World

Pair = tuple[str, str]
Stamp = tuple[int, int]
"""(term of the controller, number of its order): what is older than what was done last to a slot comes too late."""


class Holder(Process):
    """What replicas and routers have in common: slots, and obedience to the newest controller alone."""

    checks_stamps = True

    def __init__(self, world: World, name: str, incarnation: str, ids: tuple[str, ...]) -> None:
        super().__init__(name, incarnation)
        self.world = world
        self.ids = frozenset(ids)
        self.slots: set[Pair] = set()
        self.term = 0
        self._stamps: dict[Pair, Stamp] = {}

    def obeys(self, term: int) -> bool:
        """Whether this controller is the newest one heard of."""
        if term < self.term and self.world.registry.fenced:
            return False
        self.term = max(term, self.term)
        return True

    def on_report(self, reply: Reply, term: int) -> None:
        """Say what is held."""
        if self.obeys(term):
            reply((self.incarnation, self.ids, frozenset(self.slots)))

    def on_stage(self, reply: Reply, stamp: Stamp, incarnation: str, id: str, version: str) -> None:
        """LoadVersion and verify a candidate beside what is held; replies with the version or the error."""
        if self.obeys(stamp[0]) and incarnation == self.incarnation:
            self.world.clock.after(self.world.loading_time(), self._staged, reply, stamp, id, version)

    def _staged(self, reply: Reply, stamp: Stamp, id: str, version: str) -> None:
        if not self.alive:
            return
        if self.world.stage_fails():
            reply(FailedPrecondition(f"{id} {version}: its checksum is not the one declared"))
            return
        self._hold((id, version), stamp)
        self.world.faults.reached("stage", "after", self)
        reply(version)

    def on_load(self, reply: Reply, stamp: Stamp, incarnation: str, id: str, version: str) -> None:
        """LoadVersion a committed version."""
        if self.obeys(stamp[0]) and incarnation == self.incarnation:
            self.world.clock.after(self.world.loading_time(), self._loaded, reply, stamp, id, version)

    def _loaded(self, reply: Reply, stamp: Stamp, id: str, version: str) -> None:
        if not self.alive:
            return
        if self.world.load_fails():
            reply(FailedPrecondition("out of memory"))
            return
        self._hold((id, version), stamp)
        self.world.faults.reached("load", "after", self)
        reply(version)

    def on_unload(self, reply: Reply, stamp: Stamp, incarnation: str, id: str, version: str) -> None:
        """Forget a version, unless it was asked for again since."""
        pair = (id, version)
        late = self.checks_stamps and stamp < self._stamps.get(pair, (0, 0))
        if self.obeys(stamp[0]) and incarnation == self.incarnation and not late:
            self.slots.discard(pair)
            self.world.faults.reached("unload", "after", self)
            reply("gone")

    def _hold(self, pair: Pair, stamp: Stamp) -> None:
        self.slots.add(pair)
        self._stamps[pair] = max(stamp, self._stamps.get(pair, stamp))
        self.world.checker.holds(self)


class Replica(Holder):
    """Computes. What it answers is the version that it has truly computed with."""

    def on_compute(self, reply: Reply, expert: str, version: str) -> None:
        """One message of rows."""
        found = self.found(expert, version)
        self.world.clock.after(self.world.computing_time(), self._computed, reply, expert, found)

    def found(self, expert: str, version: str) -> str | None:
        """The version that will compute; None where exactly this one is not held."""
        return version if (expert, version) in self.slots else None

    def _computed(self, reply: Reply, expert: str, version: str | None) -> None:
        reply(VersionGone(f"{expert} is not loaded here in this version") if version is None else version)

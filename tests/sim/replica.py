"""A replica: holds versions in slots, computes for exactly the version asked, or refuses."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sim.network import Process, Reply

from expertmesh.cluster.control.messages import Candidate
from expertmesh.experts.errors import FailedPrecondition, VersionGone
from expertmesh.experts.spec import ANY
from expertmesh.experts.staging.stage import Receipt

if TYPE_CHECKING:
    from sim.world import World

Pair = tuple[str, str]
Stamp = tuple[int, int]
"""(term of the controller, number of its message): what is older than what was done last to a slot comes too late."""


def digits(text: str) -> str:
    """A sha256 as hexadecimal text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(id: str, tensors: str) -> str:
    """What the digits of a version come from."""
    return digits(f"{id} {tensors}")


def declared_tensors(edit: int) -> str:
    """The digest of the tensors that an expert has as it is declared, after so many edits."""
    return digits(f"as declared, edit {edit}")


class Holder(Process):
    """What replicas and routers have in common: slots, and obedience to the newest controller alone."""

    checks_stamps = True

    def __init__(self, world: World, name: str, incarnation: str, ids: tuple[str, ...]) -> None:
        super().__init__(name, incarnation)
        self.world = world
        self.ids = frozenset(ids)
        self.slots: set[Pair] = set()
        self._stamps: dict[Pair, Stamp] = {}

    def on_report(self, reply: Reply) -> None:
        """Say what is held."""
        reply((self.incarnation, self.ids, frozenset(self.slots)))

    def on_stage(self, reply: Reply, stamp: Stamp, step: str, candidate: Candidate) -> None:
        """Load and verify a version beside what is held; replies with the receipt or the error."""
        self.world.clock.after(self.world.loading_time(), self._staged, reply, stamp, step, candidate)

    def _staged(self, reply: Reply, stamp: Stamp, step: str, candidate: Candidate) -> None:
        if not self.alive:
            return
        if self.world.fails(step):
            reply(FailedPrecondition(f"{candidate.id}: its checksum is not the one declared"))
            return
        receipt = self._receipt(candidate)
        self._hold((receipt.id, receipt.version), stamp)
        self.world.faults.reached(step, "after", self)
        reply(receipt)

    def _receipt(self, candidate: Candidate) -> Receipt:
        edit = 0 if candidate.expert is None else candidate.expert.kwargs["edit"]
        tensors = candidate.tensor_digest or declared_tensors(edit)
        version, digest = candidate.version, digest_of(candidate.id, tensors)
        if version is None:
            version = f"v{candidate.counter}-{digest[:12]}"
        else:
            digest = version.partition("-")[2].ljust(64, "0")
        return Receipt(candidate.id, version, self.incarnation, digest, tensors, None, 0, 0.0, ANY, ANY)

    def on_unload(self, reply: Reply, stamp: Stamp, id: str, version: str) -> None:
        """Forget a version, unless it was asked for again since."""
        pair = (id, version)
        if self.checks_stamps and stamp < self._stamps.get(pair, (0, 0)):
            return
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

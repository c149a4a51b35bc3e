"""A replica: holds versions in slots, computes for exactly the version asked, or refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sim.network import Process, Reply

from expertmesh.cluster.channel.refused import Refused, identity
from expertmesh.cluster.control.messages import Candidate
from expertmesh.cluster.control.orders import Order
from expertmesh.experts.errors import FailedPrecondition, Fenced, VersionGone
from expertmesh.experts.spec import ANY
from expertmesh.experts.staging.stage import Receipt

if TYPE_CHECKING:
    from sim.world import World

Pair = tuple[str, str]


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

    def __init__(self, world: World, name: str, incarnation: str, ids: tuple[str, ...]) -> None:
        super().__init__(name, incarnation)
        self.world = world
        self.ids = frozenset(ids)
        self.slots: set[Pair] = set()
        self.orders = world.rules.orders()

    @property
    def session(self) -> str:
        """What the controller knows this process by."""
        return self.incarnation

    def later(self, delay: float, step: Callable[..., None], *arguments: Any) -> None:
        """Take a step after a while, if this process runs then."""
        self.world.clock.after(delay, lambda: self.run(lambda: step(*arguments)))

    def obeys(self, reply: Reply, order: Order) -> bool:
        """Whether an order is obeyed; whoever gave it is told if not."""
        try:
            self.orders.check(order)
        except Fenced as error:
            self.world.checker.counts["orders of a replaced controller"] += 1
            reply(error)
            return False
        self.world.checker.obeyed(self, order.term)
        return True

    def on_stage(self, reply: Reply, order: Order, step: str, candidate: Candidate) -> None:
        """Load and verify a version beside what is held; replies with the receipt or the error."""
        if self.obeys(reply, order):
            self.later(self.world.loading_time(), self._staged, reply, order, step, candidate)

    def _staged(self, reply: Reply, order: Order, step: str, candidate: Candidate) -> None:
        if not self.alive:
            return
        if self.world.fails(step):
            reply(FailedPrecondition(f"{candidate.id}: its checksum is not the one declared"))
            return
        receipt = self._receipt(candidate)
        self.slots.add((receipt.id, receipt.version))
        self.orders.staged(receipt.id, receipt.version, order)
        self.world.checker.holds(self)
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
        return Receipt(candidate.id, version, self.session, digest, tensors, None, 0, 0.0, ANY, ANY)

    def on_unload(self, reply: Reply, order: Order, id: str, version: str) -> None:
        """Forget a version, unless it was asked for again since."""
        if self.obeys(reply, order) and self.orders.may_unload(id, version, order):
            self.world.checker.unloads(self, (id, version))
            self.slots.discard((id, version))
            self.world.faults.reached("unload", "after", self)
            reply("gone")


class Replica(Holder):
    """Computes. What it answers is the version that it has truly computed with."""

    def __init__(self, world: World, name: str, incarnation: str, ids: tuple[str, ...]) -> None:
        super().__init__(world, name, incarnation, ids)
        self.refused = Refused()

    def on_report(self, reply: Reply, order: Order, given_up: Mapping[str, str]) -> None:
        """Refuse routers that are given up, and say what is held."""
        if self.obeys(reply, order):
            self.refuse(given_up)
            reply((self.incarnation, self.ids, frozenset(self.slots)))

    def refuse(self, given_up: Mapping[str, str]) -> None:
        """Answer these routers no more."""
        connected = [identity(router.name, router.session) for router in self.world.routers() if router.alive]
        self.refused.add(given_up, connected)

    def on_compute(self, reply: Reply, router: str, expert: str, version: str) -> None:
        """One message of rows."""
        found = self.found(expert, version)
        self.later(self.world.computing_time(), self._computed, reply, router, expert, found)

    def found(self, expert: str, version: str) -> str | None:
        """The version that will compute; None where exactly this one is not held."""
        return version if (expert, version) in self.slots else None

    def _computed(self, reply: Reply, router: str, expert: str, version: str | None) -> None:
        if router in self.refused:
            reply(Fenced("the controller has given this router up"))
            return
        reply(VersionGone(f"{expert} is not loaded here in this version") if version is None else version)

"""A router: the real `Epochs` and `View`, gates in slots, a lease, and requests that pin an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sim.network import Reply
from sim.replica import Holder

from expertmesh.experts.errors import Unavailable
from expertmesh.router.epochs.epochs import Epoch, Epochs
from expertmesh.router.fanout.replica_view import Replica as Reported
from expertmesh.router.fanout.replica_view import View

if TYPE_CHECKING:
    from sim.calls import Request
    from sim.world import World

GATE = "l/gate"
LEASE = 8.0
"""Seconds that a router may serve after the controller sent what it last took in."""


class Router(Holder):
    """Holds gates like a replica holds experts. Whoever serves after its lease would serve what may be unloaded."""

    checks_order = True

    def __init__(self, world: World, name: str, incarnation: str) -> None:
        super().__init__(world, name, incarnation, (GATE,))
        self.epochs = Epochs()
        self.view = View(world.clock.rng)
        self.requests: set[Request] = set()
        self.leases: dict[int, Epoch] = {}
        self.lease_until = 0.0
        self._told: tuple[int, int] = (0, 0)

    @property
    def serves(self) -> bool:
        """Whether requests may be taken, and answers given."""
        return self.alive and self.epochs.number > 0 and self.world.clock.now < self.lease_until

    def on_hello(self, reply: Reply, term: int) -> None:
        """Say who is there; grants no lease."""
        if self.obeys(term):
            reply(self.incarnation)

    def on_sync(
        self,
        reply: Reply,
        stamp: tuple[int, int],
        sent: float,
        epochs: Mapping[int, Mapping[str, str]],
        current: int,
        replicas: Sequence[Reported] | None,
    ) -> None:
        """Take what the controller knows; replies with what is adopted, pinned and held here."""
        if not self.obeys(stamp[0]) or self.world.clock.now >= sent + LEASE:
            return
        self._renew(sent + LEASE)
        if stamp > self._told or not self.checks_order:
            self._told = stamp
            if replicas is not None:
                self.view.update(replicas)
        self._adopt(epochs, current)
        self.world.faults.reached("sync", "after", self)
        reply((self.incarnation, self.epochs.number, self.epochs.oldest_pinned(), frozenset(self.slots)))

    def fence(self) -> None:
        """End every request: what they pinned may be unloaded from now on."""
        for request in sorted(self.requests, key=lambda request: request.number):
            request.fail(Unavailable("the router has lost its lease"))
        for number in list(self.leases):
            self.end_lease(number)

    def lease(self, number: int) -> None:
        """Pin the current epoch for a client that will ask several times."""
        self.leases[number] = self.epochs.pin()

    def end_lease(self, number: int) -> None:
        """Give back what a client has pinned, once its last request has ended; a second time does nothing."""
        if self.serves and any(request.lease == number for request in self.requests):
            self.world.clock.after(0.3, self.end_lease, number)
            return
        epoch = self.leases.pop(number, None)
        if epoch is not None:
            self.epochs.unpin(epoch)

    def _renew(self, until: float) -> None:
        if self.world.clock.now >= self.lease_until:
            self.fence()
        if until > self.lease_until:
            self.lease_until = until
            self.world.clock.after(until - self.world.clock.now, self._lease_ended, until)

    def _lease_ended(self, until: float) -> None:
        if self.alive and self.lease_until == until:
            self.fence()

    def _adopt(self, epochs: Mapping[int, Mapping[str, str]], current: int) -> None:
        """Adopt the current epoch once its gate is here, and know those that were recalled."""
        built = {n: Epoch(n, versions) for n, versions in epochs.items() if (GATE, versions[GATE]) in self.slots}
        if current in built and self.epochs.adopt(built[current]):
            self.world.checker.adopted(self, current)
        self.epochs.keep([epoch for number, epoch in built.items() if number != current])

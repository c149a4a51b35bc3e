"""The router: the real `Epochs` and `View`, gates in slots, and requests and leases that pin an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sim.network import Reply
from sim.replica import Holder

from expertmesh.cluster.control.messages import Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.experts.errors import Unavailable
from expertmesh.router.epochs.epochs import Epoch, Epochs
from expertmesh.router.fanout.replica_view import View

if TYPE_CHECKING:
    from sim.calls import Request
    from sim.world import World

GATE = "l/gate"


class Router(Holder):
    """Holds gates like a replica holds experts, and takes what the controller says as `RouterService` does."""

    def __init__(self, world: World, name: str, incarnation: str) -> None:
        super().__init__(world, name, incarnation, (GATE,))
        self.epochs = Epochs()
        self.view = View(world.clock.rng)
        self.requests: set[Request] = set()
        self.leases: dict[int, Epoch] = {}
        self._revision = 0

    @property
    def serves(self) -> bool:
        """Whether requests may be taken."""
        return self.alive and self.epochs.number > 0

    def on_declare(self, reply: Reply, desired: Desired) -> None:
        """Take newer declared layers."""
        self._revision = max(self._revision, desired.revision)
        reply("declared")

    def on_sync(self, reply: Reply, order: Order, update: RouterUpdate) -> None:
        """Take what the controller knows; replies with what is adopted, pinned and held here."""
        if not self.obeys(reply, order):
            return
        if self.orders.is_newest_update(order):
            self.view.update(update.replicas)
            if self._revision:
                self._adopt(update.epochs, update.current)
        self.world.faults.reached("sync", "after", self)
        reply(
            RouterReport(
                incarnation=self.incarnation,
                revision=self._revision,
                epoch=self.epochs.number,
                oldest_pinned=self.epochs.oldest_pinned(),
                gates=frozenset(self.slots),
            )
        )

    def end(self) -> None:
        """End every request: the process has died."""
        for request in sorted(self.requests, key=lambda request: request.number):
            request.fail(Unavailable("the router has died"))
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

    def _adopt(self, epochs: Mapping[int, Mapping[str, str]], current: int) -> None:
        """Adopt the current epoch once its gate is here, and know those that were recalled."""
        built = {n: Epoch(n, versions) for n, versions in epochs.items() if (GATE, versions[GATE]) in self.slots}
        if current in built and self.epochs.adopt(built[current]):
            self.world.checker.adopted(self, current)
        self.epochs.keep([epoch for number, epoch in built.items() if number != current])

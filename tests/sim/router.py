"""The router: the real `Epochs` and `View`, gates in slots, and requests and leases that pin an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING

from sim.network import Reply
from sim.replica import Holder, Replica

from expertmesh.cluster.channel.refused import identity
from expertmesh.cluster.control.messages import Desired, RouterReport, RouterUpdate
from expertmesh.cluster.control.orders import Order
from expertmesh.experts.errors import Unavailable
from expertmesh.router.epochs.epochs import Epoch, Epochs
from expertmesh.router.fanout.replica_view import View
from expertmesh.router.request.standing import TICK_SECONDS, Standing

if TYPE_CHECKING:
    from sim.calls import Request
    from sim.world import World

GATE, LAYER = "l/gate", "l/layer"


class Router(Holder):
    """Holds gates like a replica holds experts, and takes what the controller says as `RouterService` does."""

    def __init__(self, world: World, name: str, incarnation: str) -> None:
        super().__init__(world, name, incarnation, (GATE, LAYER))
        self.epochs = Epochs()
        self.view = View(world.clock.rng)
        self.requests: set[Request] = set()
        self.leases: dict[int, Epoch] = {}
        self.doubtful: set[int] = set()
        """Pinned by an earlier session: whoever has given that up has given up its pins."""
        named = (f"{incarnation}/{number}" for number in count(1))
        self.standing = Standing(self._lost, clock=lambda: world.clock.now, name=lambda: next(named))
        self.standing.required = True
        self._revision = 0
        self._tick()

    def is_refused(self) -> bool:
        """Whether no replica that this router knows would answer it."""
        known = {replica.incarnation for replica in self.view.replicas()}
        reached = [found for found in self.world.holders() if isinstance(found, Replica) and found.incarnation in known]
        return all(identity(self.name, self.session) in found.refused for found in reached if found.alive)

    def _lost(self) -> None:
        self.doubtful |= set(self.epochs.pins())

    def _tick(self) -> None:
        self.standing.tick()
        self.later(TICK_SECONDS, self._tick)

    @property
    def session(self) -> str:
        """What the controller knows this router by."""
        return self.standing.session

    @property
    def serves(self) -> bool:
        """Whether requests may be taken."""
        return self.alive and self.frozen is None and self.epochs.number > 0 and self.standing.kept

    def on_declare(self, reply: Reply, desired: Desired) -> None:
        """Take newer declared layers."""
        self._revision = max(self._revision, desired.revision)
        reply("declared")

    def on_sync(self, reply: Reply, order: Order, update: RouterUpdate) -> None:
        """Take what the controller knows; replies with what is adopted, pinned and held here."""
        if not self.obeys(reply, order):
            return
        self.standing.lose(update.given_up)
        if self.orders.is_newest_update(order):
            self.view.update(update.replicas)
            if self._revision:
                self._adopt(update.epochs, update.current)
            if self.epochs.number >= update.current:
                self.standing.confirmed(update.session)
        self.world.faults.reached("sync", "after", self)
        reply(
            RouterReport(
                incarnation=self.session,
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
            self.later(0.3, self.end_lease, number)
            return
        epoch = self.leases.pop(number, None)
        if epoch is not None:
            self.epochs.unpin(epoch)

    def _adopt(self, epochs: Mapping[int, Mapping[str, str]], current: int) -> None:
        """Adopt the current epoch once its gate and layer are here, and know those that were recalled."""
        needed = {n: {(id, versions[id]) for id in (GATE, LAYER)} for n, versions in epochs.items()}
        built = {n: Epoch(n, versions) for n, versions in epochs.items() if needed[n] <= self.slots}
        if current in built and self.epochs.adopt(built[current]):
            self.world.checker.adopted(self, current)
        self.epochs.keep([epoch for number, epoch in built.items() if number != current])

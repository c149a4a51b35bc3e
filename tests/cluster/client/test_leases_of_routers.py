"""Leases where there are several routers: a lease belongs to the router that gave it, and its id says which."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from helpers.answers import answered

from expertmesh.cluster.client.calls import Calls
from expertmesh.cluster.client.retry import Answer, Attempt, Flow, Pause, Retries, RetryBudget, RetryPolicy, Step, drive
from expertmesh.cluster.client.routers.balance import Balance, Target
from expertmesh.cluster.rpc.documents import encode_document
from expertmesh.cluster.rpc.swaps import Lease
from expertmesh.experts import wire
from expertmesh.experts.errors import FailedPrecondition, RouterUnavailable

X = np.ones((2, 3), np.float32)


class World:
    """Routers that keep leases of their own, of which some are `lost`, and a client of all of them."""

    def __init__(self, *addresses: str) -> None:
        self.now = 0.0
        self.leases: dict[str, set[str]] = {address: set() for address in addresses}
        self.lost: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        retries = Retries(policy=RetryPolicy(), budget=RetryBudget(), clock=lambda: self.now, jitter=lambda: 0.0)
        self.calls = Calls(token="t", retries=retries, routers=self.routers(*addresses))

    def routers(self, *addresses: str) -> Balance:
        targets = [Target(address=address, connect_to=address) for address in addresses]
        return Balance(targets, lambda: self.now, shuffle=lambda targets: None)

    def run(self, flow: Flow[Any]) -> Any:
        return drive(flow, self.perform)

    def perform(self, step: Step) -> Answer:
        if isinstance(step, Pause):
            self.now += step.seconds
        return answered(step, self.answer) if isinstance(step, Attempt) else None

    def answer(self, attempt: Attempt) -> Answer:
        router, method = attempt.route.tried[-1].address, attempt.method.rpartition("/")[2]
        self.asked.append((router, method))
        if router in self.lost:
            return RouterUnavailable("cannot be reached")
        leases, meta = self.leases[router], wire.decode(attempt.payload).meta
        if method == "Pin":
            leases.add(f"lease-{len(leases)}")
            return encode_document("lease", asdict(Lease(pin=f"lease-{len(leases) - 1}", epoch=3, ttl=9.0)))
        if method == "Leases":
            return encode_document("leases", {"leases": [{"pin": pin, "epoch": 3} for pin in sorted(leases)]})
        if method == "Unpin":
            leases.discard(meta["pin"])
            return encode_document("unpinned", {})
        if method == "Drain":
            return encode_document("status", {"state": "draining"})
        if meta.get("pin", "lease-0") not in leases:
            return FailedPrecondition("the lease has ended")
        reply = {"request_id": meta["request_id"], "epoch": 3, "versions": {}}
        return wire.encode("reply", reply, {"output": wire.decode(attempt.payload).tensors["x"]})


def test_every_call_of_a_lease_goes_to_the_router_that_gave_it() -> None:
    world = World("a:1", "b:1", "c:1")
    for router in world.leases:
        lease = world.run(world.calls.lease())
        assert lease.pin == f"lease-0@{router}"
        world.asked.clear()
        for pin in (lease, lease.pin, replace(lease)):
            world.run(world.calls.forward("l", X, pin=pin))
        world.run(world.calls.give_back(lease))
        assert world.asked == [(router, "Call")] * 3 + [(router, "Unpin")]
    assert world.leases == {"a:1": set(), "b:1": set(), "c:1": set()}


def test_a_lease_whose_router_is_lost_says_so_and_moves_nowhere() -> None:
    world = World("a:1", "b:1")
    lease = world.run(world.calls.lease())
    world.lost = {"a:1"}
    world.asked.clear()
    with pytest.raises(RouterUnavailable, match="takes no calls: pin again, or name the epoch; cannot be reached"):
        world.run(world.calls.forward("l", X, pin=lease))
    assert set(world.asked) == {("a:1", "Call")}
    world.run(world.calls.lease())
    assert world.leases["b:1"] == {"lease-0"}


def test_a_lease_of_another_client_is_found_by_its_id() -> None:
    world = World("a:1", "b:1")
    lease = world.run(world.calls.lease())
    other = replace(world.calls, routers=world.routers("b:1", "a:1"))
    world.asked.clear()
    for _ in range(3):
        world.run(other.forward("l", X, pin=lease.pin))
    assert world.asked == [("a:1", "Call")] * 3
    only = replace(world.calls, routers=world.routers("a:1"))
    world.run(only.forward("l", X, pin="lease-0@another.name:1"))  # it has one router, by whatever name
    with pytest.raises(FailedPrecondition, match=r"belongs to the router at c:1, .*\(a:1, b:1\)"):
        world.run(world.calls.forward("l", X, pin="lease-0@c:1"))


def test_the_leases_of_all_routers_are_listed_and_ended() -> None:
    world = World("a:1", "b:1", "c:1")
    pins = [world.run(world.calls.lease()).pin for _ in range(3)]
    assert [lease["pin"] for lease in world.run(world.calls.leases())] == pins
    world.lost = {"b:1"}  # and its leases with it
    assert [lease["pin"] for lease in world.run(world.calls.leases())] == [pins[0], pins[2]]
    world.run(world.calls.end_lease(pins[2]))
    assert world.leases["c:1"] == set()
    world.lost = set()
    world.run(world.calls.end_lease("lease-0"))  # an id that names no router
    assert world.leases == {"a:1": set(), "b:1": set(), "c:1": set()}
    world.lost = {"a:1", "b:1", "c:1"}
    with pytest.raises(RouterUnavailable):
        world.run(world.calls.leases())


def test_a_cluster_drains_when_every_router_does() -> None:
    world = World("a:1", "b:1")
    assert world.run(world.calls.drain()) == {"state": "draining"}
    assert world.asked == [("a:1", "Drain"), ("b:1", "Drain")]
    world.lost = {"a:1"}
    world.asked.clear()
    with pytest.raises(RouterUnavailable):
        world.run(world.calls.drain())
    assert world.asked[-1] == ("b:1", "Drain")

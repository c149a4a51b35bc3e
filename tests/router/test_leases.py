"""Leases on epochs: they keep what they pin, are renewed by use, and expire; the test moves the clock."""

from __future__ import annotations

import itertools

import pytest

from expertmesh.experts.errors import FailedPrecondition, InvalidRequest, Overloaded, Unavailable
from expertmesh.router.epochs.epochs import Epoch, Epochs
from expertmesh.router.epochs.leases import MAX_LEASES, MAX_LEASES_OF_ONE, MAX_LIFE, MAX_TTL, REPLACED_SECONDS, Leases


class World:
    """Epochs, their leases, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.epochs = Epochs()
        numbers = itertools.count()
        self.leases = Leases(self.epochs, lambda: self.now, new_id=lambda: f"lease-{next(numbers)}")
        self.epochs.adopt(Epoch(1, {"l/e": "v1"}))

    def use(self, lease: str) -> int:
        """Do what a request does: pin, work, unpin."""
        epoch = self.leases.pin(lease)
        self.epochs.unpin(epoch)
        return epoch.number


def test_a_lease_holds_its_epoch_while_others_are_adopted() -> None:
    world = World()
    lease, epoch, ttl = world.leases.lease(30.0)
    assert (lease, epoch.number, ttl) == ("lease-0", 1, 30.0)
    world.epochs.adopt(Epoch(2, {"l/e": "v2"}))
    assert (world.epochs.oldest_pinned(), world.epochs.pins()) == (1, {1: 1})
    assert world.epochs.draining() == {"l/e": ["v1"]}
    assert world.use(lease) == 1
    assert world.leases.give_back(lease)
    assert (world.epochs.oldest_pinned(), world.epochs.pins(), world.epochs.draining()) == (2, {}, {})
    assert not world.leases.give_back(lease)
    with pytest.raises(FailedPrecondition, match="pin again"):
        world.use(lease)


def test_a_lease_expires_unused_and_is_renewed_by_use() -> None:
    world = World()
    used, unused = world.leases.lease(10.0)[0], world.leases.lease(10.0)[0]
    for _ in range(5):
        world.now += 9.0
        assert world.use(used) == 1
    with pytest.raises(FailedPrecondition):
        world.use(unused)
    assert world.epochs.pins() == {1: 1}
    world.now += 10.0
    assert world.leases.drop_expired() == 1
    assert (len(world.leases), world.epochs.pins()) == (0, {})


def test_a_request_on_a_lease_keeps_the_epoch_when_the_lease_ends() -> None:
    world = World()
    lease = world.leases.lease(1.0)[0]
    epoch = world.leases.pin(lease)
    world.epochs.adopt(Epoch(2))
    world.now += 5.0
    world.leases.drop_expired()
    assert world.epochs.oldest_pinned() == 1
    world.epochs.unpin(epoch)
    assert world.epochs.oldest_pinned() == 2


def test_no_lease_lives_forever_however_often_it_is_used() -> None:
    world = World()
    lease, _, ttl = world.leases.lease(1e9)
    assert ttl == MAX_TTL
    began = world.now
    while world.now + ttl / 2 < began + MAX_LIFE:
        world.now += ttl / 2
        world.use(lease)
    world.now = began + MAX_LIFE
    with pytest.raises(FailedPrecondition):
        world.use(lease)


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan")])
def test_an_invalid_time_to_live_is_rejected(ttl: float) -> None:
    world = World()
    with pytest.raises(InvalidRequest, match="ttl"):
        world.leases.lease(ttl)
    assert world.epochs.pins() == {}


def test_leases_are_limited_and_expired_ones_make_room() -> None:
    world = World()
    for number in range(MAX_LEASES):
        world.leases.lease(5.0, f"token-{number // MAX_LEASES_OF_ONE}")
    with pytest.raises(Overloaded):
        world.leases.lease(5.0)
    world.now += 5.0
    assert world.leases.lease(5.0)[1].number == 1
    assert (len(world.leases), world.epochs.pins()) == (1, {1: 1})


def test_before_the_first_epoch_nothing_can_be_leased() -> None:
    with pytest.raises(Unavailable):
        Leases(Epochs(), lambda: 0.0).lease(1.0)


def test_one_holder_cannot_take_the_leases_of_the_others() -> None:
    world = World()
    for _ in range(MAX_LEASES_OF_ONE):
        world.leases.lease(60.0, "greedy")
    with pytest.raises(Overloaded, match="your token holds 250 leases of at most 250"):
        world.leases.lease(60.0, "greedy")
    assert world.leases.lease(60.0, "modest")[1].number == 1


def test_a_lease_on_an_epoch_that_was_replaced_ends_soon_however_it_is_used() -> None:
    world = World()
    lease, _, _ = world.leases.lease(60.0)
    for _ in range(10):
        world.now += 30.0
        world.use(lease)
    world.epochs.adopt(Epoch(2, {"l/e": "v2"}))
    world.leases.drop_expired()
    for _ in range(9):
        world.now += REPLACED_SECONDS / 10
        assert world.use(lease) == 1
    world.now += REPLACED_SECONDS / 10
    with pytest.raises(FailedPrecondition, match="a swap replaced its epoch"):
        world.use(lease)
    assert (world.epochs.oldest_pinned(), world.epochs.draining()) == (2, {})
    assert world.use(world.leases.lease(60.0)[0]) == 2


def test_leases_are_listed_with_whose_they_are_and_can_be_ended() -> None:
    world = World()
    first = world.leases.lease(30.0, "a")[0]
    world.now += 5.0
    world.leases.lease(20.0, "b")
    world.epochs.adopt(Epoch(2))
    assert world.leases.documents() == [
        {"pin": "lease-0", "epoch": 1, "holder": "a", "age": 5.0, "ends_in": 10.0},
        {"pin": "lease-1", "epoch": 1, "holder": "b", "age": 0.0, "ends_in": 10.0},
    ]
    assert world.leases.give_back(first)
    assert [lease["holder"] for lease in world.leases.documents()] == ["b"]

"""An attached router is a member of a cluster: it follows swaps, pins epochs, and is missed when it is silent."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.attached import attached_to
from helpers.swap_cluster import GATE, SwapCluster, X, swap_cluster
from helpers.waiting import eventually

from expertmesh import Reply
from expertmesh.cluster.control.routers import follow
from expertmesh.experts.errors import Aborted

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def running(tmp_path: Path) -> Any:
    with swap_cluster(tmp_path, replicas=2) as made:
        yield made


def seeds(number: int) -> dict[str, int]:
    return {"l/a": number, "l/b": number + 1, "l/c": number + 2, GATE: number}


def swapped(running: SwapCluster, number: int) -> Any:
    """The outcome of a swap, as soon as what a router may pin is known and let go."""
    outcomes: list[Any] = []

    def done() -> bool:
        with suppress(Aborted):
            outcomes.append(running.swap(seeds(number)))
        return bool(outcomes)

    eventually(done, 30, "nothing drains any more")
    return outcomes[0]


def test_once_a_swap_has_returned_it_answers_from_the_new_epoch_and_mixes_none(running: SwapCluster) -> None:
    seen: list[Reply] = []
    stop = threading.Event()
    with attached_to(running) as (router, _):

        def calls() -> None:
            while not stop.is_set():
                seen.append(router.call("l", X))

        thread = threading.Thread(target=calls)
        thread.start()
        try:
            for number in range(10, 40, 3):
                outcome = running.swap(seeds(number))
                reply = router.call("l", X)
                assert reply.epoch == outcome.epoch
                running.weights.check(reply)
        finally:
            stop.set()
            thread.join()
    assert len(seen) > 10
    for reply in seen:
        running.weights.check(reply)


def test_what_it_pins_stays_loaded_until_it_lets_go_or_leaves(running: SwapCluster) -> None:
    with attached_to(running) as (router, _):
        with router.pin() as lease:
            running.swap(seeds(10))
            running.weights.check(router.call("l", X, pin=lease))
            assert router.call("l", X, pin=lease).epoch == lease.epoch
            with pytest.raises(Aborted, match="draining"):
                running.swap(seeds(20))
        swapped(running, 20)
        router.pin().__enter__()
        swapped(running, 30)
    swapped(running, 40)
    running.call()


def test_it_swaps_and_names_epochs_like_a_client(running: SwapCluster) -> None:
    with attached_to(running) as (router, _):
        first = router.call("l", X).epoch
        outcome = router.swap(running.weights.files({"l/a": 10}))
        running.weights.became(outcome.after, {"l/a": 10})
        assert router.call("l", X).epoch == outcome.epoch > first
        running.weights.check(running.client.call("l", X))
        again = router.call("l", X, epoch=first)
        assert again.epoch == first
        running.weights.check(again)
        assert [entry["current"] for entry in router.history("l/a")] == [False, True]


def test_a_silent_one_holds_up_no_swap_for_longer_than_its_lease_and_joins_again(
    running: SwapCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.cluster._backend._controller.routers.leases, "_seconds", 2.0)
    monkeypatch.setattr(follow, "ROUTER_TIMEOUT", 0.3)
    with attached_to(running) as (router, connection), attached_to(running, "attached-2") as (other, _):
        loop = router._engine._service.loop
        loop.call_soon_threadsafe(connection.seat.thawed.clear)
        for number in (10, 20):
            running.swap(seeds(number))
            running.weights.check(other.call("l", X))
        loop.call_soon_threadsafe(connection.seat.thawed.set)
        outcome = swapped(running, 30)
        eventually(lambda: router.call("l", X).epoch == outcome.epoch, 20, "it is up to date again")
        outcome = swapped(running, 40)
        assert router.call("l", X).epoch == outcome.epoch

"""Two routers on Ray: both serve, one is killed or frozen, and swaps hold on both."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from helpers.swap_cluster import GATE, NAME, SwapCluster, X, swap_cluster
from helpers.waiting import eventually

from expertmesh import Client, Reply, errors
from expertmesh.cluster.machine.ports import listens
from expertmesh.cluster.machine.run_files import token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.methods import Role

pytestmark = pytest.mark.ray
TIMEOUT = 10.0
BACK = 40.0
"""How long a router may take to be back: Ray starts its process again, and the controller fills it."""


@pytest.fixture(scope="module")
def running(nothing_left: None, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwapCluster]:
    folder = tmp_path_factory.mktemp("routers")
    with swap_cluster(folder, replicas=2, transport=transport, routers=2) as started:
        yield started


@pytest.fixture(scope="module")
def clients(running: SwapCluster) -> Iterator[list[Client]]:
    """A client of each router alone: a token that is given goes to the address that is given."""
    token = read_token(token_path(NAME), Role.ADMIN)
    with ExitStack() as opened:
        yield [
            opened.enter_context(Client(endpoint, token=token, timeout=TIMEOUT))
            for endpoint in running.cluster.endpoints
        ]


@pytest.fixture(scope="module")
def of_both(running: SwapCluster) -> Iterator[Client]:
    """A client that knows both routers."""
    with Client(running.cluster.endpoints, timeout=TIMEOUT) as client:
        yield client


class Traffic:
    """Calls of one client without pause; keeps its replies and the errors of the others."""

    def __init__(self, client: Client) -> None:
        self.replies: list[Reply] = []
        self.failed: list[errors.ExpertMeshError] = []
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._call)

    def _call(self) -> None:
        while not self._stop.is_set():
            try:
                self.replies.append(self._client.call("l", X))
            except errors.ExpertMeshError as error:
                self.failed.append(error)
                self._stop.wait(0.02)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def goes_on(self) -> None:
        """Wait until some more calls were answered."""
        before = len(self.replies)
        eventually(lambda: len(self.replies) > before + 20, BACK, "calls are answered")


def routers(client: Client) -> dict[str, int]:
    """The processes of the routers that are ready, by name."""
    found = client.status()["routers"]
    return {name: router["pid"] for name, router in found.items() if router["state"] == "ready"}


@contextmanager
def both_ready(clients: list[Client]) -> Iterator[dict[str, int]]:
    """The processes of both routers, which are ready before and afterwards."""
    for client in clients:
        eventually(lambda client=client: len(routers(client)) == 2, BACK, "both routers are ready")
    yield routers(clients[0])
    for client in clients:
        eventually(lambda client=client: client.health() == "SERVING", BACK, "both routers serve")


def check_all(running: SwapCluster, *traffics: Traffic) -> None:
    for traffic in traffics:
        assert traffic.replies
        for reply in traffic.replies:
            running.weights.check(reply)


def test_both_routers_serve_and_know_of_each_other(running: SwapCluster, clients: list[Client]) -> None:
    with both_ready(clients) as pids:
        assert list(pids) == ["router-0", "router-1"]
        assert len({*pids.values()}) == 2
        for name, client in zip(pids, clients, strict=True):
            running.weights.check(client.call("l", X))
            status = client.status()
            assert status["router"]["name"] == name
            assert [router["endpoint"] for router in status["routers"].values()] == running.cluster.endpoints


def test_swaps_under_load_hold_on_both_when_they_are_told(running: SwapCluster, clients: list[Client]) -> None:
    with both_ready(clients), Traffic(clients[0]) as one, Traffic(clients[1]) as other:
        for seed, ids in enumerate((("l/a",), ("l/b", GATE), ("l/a", "l/b", "l/c")), start=20):
            outcome = running.swap(dict.fromkeys(ids, seed))
            for client in clients:
                reply = client.call("l", X)
                assert reply.epoch >= outcome.epoch
                running.weights.check(reply)
        one.goes_on()
        other.goes_on()
    assert (one.failed, other.failed) == ([], [])
    check_all(running, one, other)


def test_a_router_that_is_killed_comes_back_where_it_was_and_no_call_to_the_other_fails(
    running: SwapCluster, clients: list[Client], of_both: Client
) -> None:
    traffics = Traffic(clients[0]), Traffic(clients[1]), Traffic(of_both)
    with both_ready(clients) as before, traffics[0] as unharmed, traffics[1] as harmed, traffics[2] as moving:
        for traffic in traffics:
            traffic.goes_on()
        os.kill(before["router-1"], signal.SIGKILL)
        eventually(lambda: not listens(running.cluster.endpoints[1]) or harmed.failed, BACK, "it is gone")
        outcome = running.swap({"l/c": 31})  # while it starts again
        eventually(lambda: routers(clients[0]).get("router-1") not in (None, before["router-1"]), BACK, "it is back")
        for traffic in traffics:
            traffic.goes_on()
        assert clients[1].call("l", X).versions.items() >= {("l/c", outcome.after["l/c"])}
        assert routers(clients[0])["router-0"] == before["router-0"]
    assert (unharmed.failed, moving.failed) == ([], [])
    assert all(isinstance(error, (errors.Unavailable, errors.DeadlineExceeded)) for error in harmed.failed)
    check_all(running, *traffics)


def test_a_frozen_router_holds_up_a_swap_for_its_lease_and_never_answers_with_what_was_before(
    running: SwapCluster, clients: list[Client], of_both: Client
) -> None:
    late: list[Reply | errors.ExpertMeshError] = []

    def call() -> None:
        try:
            late.append(clients[1].call("l", X, timeout=60.0))
        except errors.ExpertMeshError as error:
            late.append(error)

    with both_ready(clients) as pids, Traffic(clients[0]) as unharmed, Traffic(of_both) as moving:
        moving.goes_on()
        os.kill(pids["router-1"], signal.SIGSTOP)
        try:
            outcome = running.swap({"l/a": 41, "l/b": 41})
            callers = [threading.Thread(target=call) for _ in range(16)]
            for caller in callers:
                caller.start()
            unharmed.goes_on()
            moving.goes_on()
            running.weights.check(clients[0].call("l", X, epoch=outcome.epoch - 1))  # replicas hold what was before
        finally:
            os.kill(pids["router-1"], signal.SIGCONT)
        for caller in callers:
            caller.join(90)
            assert not caller.is_alive()
        eventually(lambda: clients[1].call("l", X).epoch == outcome.epoch, BACK, "it serves again")
    assert (unharmed.failed, moving.failed) == ([], [])
    assert len(late) == len(callers)
    for answer in late:
        if isinstance(answer, Reply):
            assert answer.epoch >= outcome.epoch
            running.weights.check(answer)
        else:
            assert isinstance(answer, errors.Unavailable)
    check_all(running, unharmed, moving)

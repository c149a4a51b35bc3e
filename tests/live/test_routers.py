"""A cluster of several routers in this process: each answers every call, and all of them follow the controller."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.swap_cluster import GATE, NAME, SwapCluster, X, swap_cluster
from helpers.waiting import eventually

from expertmesh import Client, Cluster, Expert, Layer, TensorSpec, gates
from expertmesh.cluster.machine.ports import listens
from expertmesh.cluster.machine.run_files import RunFile, token_path
from expertmesh.cluster.machine.tokens import read_token
from expertmesh.cluster.rpc.methods import Role

pytestmark = pytest.mark.usefixtures("own_home")
ROUTERS = ("router-0", "router-1", "router-2")


@contextmanager
def several(folder: Path, **settings: Any) -> Iterator[tuple[SwapCluster, list[Client]]]:
    """A running cluster, and a client of each of its routers."""
    with swap_cluster(folder, routers=len(ROUTERS), **settings) as running, ExitStack() as clients:
        token = read_token(token_path(NAME), Role.ADMIN)  # one that is given goes to the address given
        yield running, [clients.enter_context(Client(one, token=token)) for one in running.cluster.endpoints]


def test_all_routers_answer_and_after_a_swap_all_with_what_it_brought(tmp_path: Path) -> None:
    with several(tmp_path) as (running, clients):
        assert len({*running.cluster.endpoints}) == len(ROUTERS)
        for seeds in ({"l/a": 11}, {"l/b": 12, GATE: 13}):
            after = running.swap(seeds).after
            for client in clients:
                reply = client.call("l", X)
                running.weights.check(reply)
                assert reply.versions.items() <= {**running.current()}.items()
                assert reply.epoch == running.cluster.status()["epoch"]
            assert after.items() <= running.current().items()


def test_a_swap_waits_for_what_another_router_has_pinned(tmp_path: Path) -> None:
    with several(tmp_path) as (running, clients):
        first = running.current()
        with clients[2].pin(ttl=30.0) as pinned:
            running.swap({"l/a": 11})
            for client in clients[:2]:
                assert client.call("l", X).versions["l/a"] != first["l/a"]
            assert clients[2].call("l", X, pin=pinned).versions["l/a"] == first["l/a"]


def test_the_status_of_each_router_names_all(tmp_path: Path) -> None:
    with several(tmp_path) as (running, clients):
        for number, client in enumerate(clients):
            client.forward("l", X)
            eventually(lambda client=client: len(client.status()["routers"]) == len(ROUTERS), 20, "all are told")
            status = client.status()
            assert status["router"]["name"] == ROUTERS[number]
            assert tuple(status["routers"]) == ROUTERS
            assert [router["endpoint"] for router in status["routers"].values()] == running.cluster.endpoints
            assert {router["state"] for router in status["routers"].values()} == {"ready"}
        eventually(
            lambda: [router["requests"] for router in clients[0].status()["routers"].values()] == [1, 1, 1],
            20,
            "each counts its own calls, and tells them",
        )
        assert tuple(running.cluster.status()["routers"]) == ROUTERS
        run = RunFile.read(NAME)
        assert (run.endpoints, run.endpoint) == (running.cluster.endpoints, running.cluster.endpoint)
        assert [Path(path).exists() for path in run.sockets] == [True] * len(ROUTERS)
    assert not [path for path in run.sockets if Path(path).exists()]


def test_each_router_has_a_metrics_page_that_names_it(tmp_path: Path) -> None:
    with several(tmp_path, metrics_port=0) as (running, _):
        token = read_token(token_path(NAME), Role.READER)
        for name, page in zip(ROUTERS, running.cluster.metrics_endpoints, strict=True):
            request = urllib.request.Request(page, headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert f'expertmesh_router_info{{router="{name}"}} 1.0' in answer.read().decode()


def test_a_stop_drains_every_router() -> None:
    began, ends = threading.Event(), threading.Event()
    answers: list[Any] = []

    def held(x: torch.Tensor) -> torch.Tensor:
        began.set()
        ends.wait(30)
        return x

    layer = Layer("l", gates.Fixed([1.0]), {"e": Expert.from_function(held)}, input=TensorSpec((1,)))
    ends.set()  # it is tried when it is staged
    with Cluster.start([layer], name=NAME, transport="local", port=0, metrics_port=None, routers=2) as cluster:
        began.clear()
        ends.clear()
        token = read_token(token_path(NAME), Role.READER)
        with Client(cluster.endpoints[1], token=token) as client:
            caller = threading.Thread(target=lambda: answers.append(client.forward("l", X[:1, :1])))
            stopper = threading.Thread(target=lambda: cluster.stop(grace=30.0))
            caller.start()
            assert began.wait(30)
            stopper.start()
            eventually(lambda: not any(map(listens, cluster.endpoints)), 30, "no new calls are taken")
            ends.set()
            for thread in (caller, stopper):
                thread.join(60)
                assert not thread.is_alive()
    assert len(answers) == 1


def test_a_stop_closes_the_ports_of_all(tmp_path: Path) -> None:
    with several(tmp_path) as (running, clients):
        assert all(map(listens, running.cluster.endpoints))
        deadline = time.monotonic() + 30
        assert all(client.health(timeout=deadline - time.monotonic()) == "SERVING" for client in clients)
    assert not any(map(listens, running.cluster.endpoints))

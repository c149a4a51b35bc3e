"""Replacing an expert of a cluster within this process: under calls nobody fails, and every reply is what it names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from expertmesh import Client, Cluster, Expert, Layer, gates
from expertmesh.experts.errors import ConfigError, ExpertMeshError, NotFound, SpecMismatch
from expertmesh.experts.spec import TensorSpec

pytestmark = pytest.mark.usefixtures("own_home")
X = np.arange(6, dtype=np.float32).reshape(2, 3) + 1


def affine(by: float, **options: Any) -> Expert:
    return Expert("helpers.samples:Affine", kwargs={"width": 3, "scale": by}, **options)


def layer_of(replicas: int, pack: str | None = None) -> Layer:
    experts = {name: affine(by, replicas=replicas, pack=pack) for name, by in (("a", 1.0), ("b", 100.0))}
    return Layer("l", gates.Fixed([1.0, 1.0]), experts, input=TensorSpec((3,)))


class Callers:
    """Calls without pause, from threads; in the end every reply is checked against the versions that it named."""

    def __init__(self, endpoint: str, threads: int = 3) -> None:
        self.replies = 0
        self.failed: list[str] = []
        self.seen: set[tuple[frozenset[str], float]] = set()
        self._stop = threading.Event()
        self._endpoint = endpoint
        self._threads = [threading.Thread(target=self._call) for _ in range(threads)]

    def _call(self) -> None:
        with Client(self._endpoint, timeout=30.0) as client:
            while not self._stop.is_set():
                try:
                    reply = client.call("l", X)
                except ExpertMeshError as error:
                    self.failed.append(repr(error))
                    continue
                by = float(reply.output[0, 0] / X[0, 0])
                if not np.array_equal(reply.output, X * by):
                    self.failed.append(f"mixed: {reply.output}")
                named = frozenset(version for name, version in reply.versions.items() if name != "l/gate")
                self.seen.add((named, by))
                self.replies += 1

    def check(self, factors: dict[str, float]) -> None:
        """Every reply is what the versions that it names compute, and every version has been seen."""
        for named, by in self.seen:
            assert len(named) == 2
            assert by == sum(factors[version] for version in named)
        assert {version for named, _ in self.seen for version in named} == set(factors)

    def wait_for_more(self, replies: int = 20) -> None:
        wanted = self.replies + replies
        while self.replies < wanted and not self.failed:
            threading.Event().wait(0.001)

    @contextmanager
    def calling(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            self.wait_for_more()
            yield
            self.wait_for_more()
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)
        assert not self.failed, self.failed[:3]


def first_versions(endpoint: str) -> dict[str, str]:
    with Client(endpoint) as client:
        return dict(client.call("l", X).versions)


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "pack"), [(1, None), (2, None), (3, None), (1, "p"), (2, "p")])
def test_nobody_fails_and_nothing_is_mixed(replicas: int, pack: str | None) -> None:
    with Cluster.start([layer_of(replicas, pack)], transport="local", port=0, name="replace") as cluster:
        versions = first_versions(cluster.endpoint)
        factors = {versions["l/a"]: 1.0, versions["l/b"]: 100.0}
        callers, made = Callers(cluster.endpoint), []
        with callers.calling():
            for expert, by in (("l/a", 2.0), ("l/b", 200.0), ("l/a", 3.0)):
                made.append(cluster.replace(expert, affine(by, replicas=5)))
                factors[made[-1]] = by
                callers.wait_for_more()
        callers.check(factors)
        assert first_versions(cluster.endpoint) == {**versions, "l/a": made[2], "l/b": made[1]}
        assert len(cluster.status()["replicas"]) == replicas * (1 if pack else 2)
        with Client(cluster.endpoint) as client:
            status = client.status()
        assert (status["router"]["pins"], status["router"]["failed_requests"]) == ({}, 0)


BAD: dict[str, tuple[Expert, type[ExpertMeshError]]] = {
    "its code is not there": (Expert("helpers.samples:no_such"), ConfigError),
    "it takes other rows": (Expert("helpers.samples:Affine", args=(5,)), SpecMismatch),
    "it gives other rows": (Expert("torch.nn:Linear", args=(3, 2)), SpecMismatch),
    "it cannot start": (Expert("helpers.samples:FailsToStart"), ConfigError),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_cannot_be_loaded_leaves_the_old_one_serving(case: str, replicas: int) -> None:
    expert, kind = BAD[case]
    with Cluster.start([layer_of(replicas)], transport="local", port=0, name="replace") as cluster:
        versions = first_versions(cluster.endpoint)
        callers = Callers(cluster.endpoint)
        with callers.calling():
            with pytest.raises(kind):
                cluster.replace("l/a", expert)
            callers.wait_for_more()
            assert first_versions(cluster.endpoint) == versions
            assert len(cluster.status()["replicas"]) == 2 * replicas
            version = cluster.replace("l/a", affine(2.0))
            callers.wait_for_more()
        callers.check({versions["l/a"]: 1.0, versions["l/b"]: 100.0, version: 2.0})


def test_an_expert_that_is_not_there() -> None:
    with Cluster.start([layer_of(1)], transport="local", port=0, name="replace") as cluster:
        for name in ("l/z", "m/a", "l", "l/gate", ""):
            with pytest.raises(NotFound, match="there is no expert"):
                cluster.replace(name, affine(2.0))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_request_that_began_on_the_old_version_ends_on_it(replicas: int) -> None:
    began, release = threading.Event(), threading.Event()

    def slow(rows: Any) -> Any:
        if bool((rows == 4096).any()):
            began.set()
            assert release.wait(60)
        return rows

    experts = {"a": Expert.from_function(slow, replicas=replicas), "b": affine(100.0)}
    layer = Layer("l", gates.Fixed([1.0, 1.0]), experts, input=TensorSpec((3,)))
    with Cluster.start([layer], transport="local", port=0, name="replace") as cluster:
        old = first_versions(cluster.endpoint)
        held: list[Any] = []

        def hold() -> None:
            with Client(cluster.endpoint, timeout=60.0) as client:
                held.append(client.call("l", X * 0 + 4096))

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert began.wait(60)
            version = cluster.replace("l/a", affine(7.0), timeout=20.0)
            assert not held
            if replicas == 2:  # a lone host in this process has one thread, which is held
                assert first_versions(cluster.endpoint)["l/a"] == version
                assert not held
        finally:
            release.set()
            thread.join(60)
        assert np.array_equal(held[0].output, X * 0 + 4096 * 101)
        assert held[0].versions == old
        with Client(cluster.endpoint) as client:
            reply = client.call("l", X)
        assert (reply.versions["l/a"], reply.output[0, 0]) == (version, X[0, 0] * 107)


def test_a_local_cluster_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    for _ in range(2):
        with Cluster.start([layer_of(2)], transport="local", port=0, name="replace") as cluster:
            first_versions(cluster.endpoint)
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("expertmesh", "expert-", "router-torch", "metrics", "versions", "uploads")):
            thread.join(20)
            assert not thread.is_alive(), thread.name


def test_a_module_stays_its_owners_and_what_is_done_to_it_later_changes_nothing() -> None:
    module, gate = nn.Linear(3, 3), gates.TopK(3, 1, k=1)
    layer = Layer("l", gate, {"a": Expert.from_module(module, replicas=2)})
    with (
        Cluster.start([layer], transport="local", port=0, name="replace") as cluster,
        Client(cluster.endpoint) as client,
    ):
        wanted = module(torch.from_numpy(X)).detach().numpy()
        assert module.weight.requires_grad
        with torch.no_grad():
            module.weight.zero_()
            gate.weight.fill_(float("nan"))
        assert np.allclose(client.forward("l", X), wanted)

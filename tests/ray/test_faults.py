"""Processes of a running cluster are killed under traffic: typed errors or answers in time, then service again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.waiting import eventually

from expertmesh import Client, Cluster, Expert, Layer, errors, gates
from expertmesh.cluster.control.orders import Order
from expertmesh.cluster.machine import run_files
from expertmesh.cluster.machine.name_lock import lock_name

pytestmark = pytest.mark.ray
TIMEOUT = 5.0
BACK = 15.0
X = np.array([0.25, 0.5, 1.0])


def functions(**replicas: int) -> dict[str, Expert]:
    return {name: Expert(f"numpy:{name}", replicas=copies) for name, copies in replicas.items()}


@pytest.fixture(scope="module")
def cluster(nothing_left: None, transport: str) -> Iterator[Cluster]:
    layers = [
        Layer("lone", gates.Fixed([0.5, 0.5]), functions(sin=1, cos=1)),
        Layer("twin", gates.Fixed([1.0]), functions(tan=2)),
    ]
    with Cluster.start(layers, name="faults", port=0, transport=transport) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoint, timeout=TIMEOUT) as connected:
        yield connected


class Traffic:
    """Calls without pause from a few threads; keeps what came of every call."""

    def __init__(self, client: Client, layer: str, expected: np.ndarray) -> None:
        self.outcomes: list[tuple[str, float]] = []
        self._stop = threading.Event()
        self._client, self._layer, self._expected = client, layer, expected
        self._threads = [threading.Thread(target=self._call) for _ in range(3)]

    def _call(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                output = self._client.forward(self._layer, X)
                outcome = "right" if np.allclose(output, self._expected) else "wrong"
            except errors.ExpertMeshError as error:
                outcome = "Unavailable" if isinstance(error, errors.Unavailable) else type(error).__name__
                self._stop.wait(0.02)
            self.outcomes.append((outcome, time.monotonic() - started))

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def count(self, outcome: str) -> int:
        return sum(1 for name, _ in self.outcomes if name == outcome)


def assert_typed_and_in_time(traffic: Traffic) -> None:
    assert traffic.count("wrong") == 0
    assert traffic.count("right") > 0
    assert {name for name, _ in traffic.outcomes} <= {"right", "Unavailable", "DeadlineExceeded"}
    assert max(seconds for _, seconds in traffic.outcomes) < TIMEOUT + 1.0


def pids_of(client: Client, expert: str) -> list[int]:
    replicas = client.status()["layers"][expert.partition("/")[0]]["experts"][expert]["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "ready"]


def pids_of_actor(word: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def pid_of_actor(word: str) -> int:
    (pid,) = pids_of_actor(word)
    return pid


def test_lone_expert_is_killed(client: Client) -> None:
    expected = 0.5 * (np.sin(X) + np.cos(X))
    (pid,) = pids_of(client, "lone/sin")
    with Traffic(client, "lone", expected) as traffic:
        eventually(lambda: traffic.count("right") > 20, BACK, "traffic before the kill")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: traffic.count("Unavailable") > 0, BACK, "the loss is told to callers")
        before = traffic.count("right")
        eventually(lambda: traffic.count("right") > before + 20, BACK, "service is back")
    assert_typed_and_in_time(traffic)
    assert pids_of(client, "lone/sin") != [pid]


def test_one_of_two_replicas_is_killed(client: Client) -> None:
    eventually(lambda: len(pids_of(client, "twin/tan")) == 2, BACK, "both replicas are ready")
    with Traffic(client, "twin", np.tan(X)) as traffic:
        eventually(lambda: traffic.count("right") > 20, BACK, "traffic before the kill")
        os.kill(pids_of(client, "twin/tan")[0], signal.SIGKILL)
        before = traffic.count("right")
        eventually(lambda: traffic.count("right") > before + 20, BACK, "the sibling serves")
        eventually(lambda: len(pids_of(client, "twin/tan")) == 2, BACK, "both replicas are ready again")
    assert {name for name, _ in traffic.outcomes} == {"right"}


def test_policy_covers_a_lost_expert(client: Client) -> None:
    (pid,) = pids_of(client, "lone/cos")
    os.kill(pid, signal.SIGKILL)
    seen = []

    def degraded() -> bool:
        seen.append(client.call("lone", X, on_missing="renormalize"))
        return bool(seen[-1].degraded)

    eventually(degraded, BACK, "a degraded answer")
    reply = seen[-1]
    assert reply.missing == ["lone/cos"]
    assert "lone/cos" not in reply.versions
    assert reply.max_lost_mass == pytest.approx(0.5)
    np.testing.assert_allclose(reply.output, np.sin(X), atol=1e-9)  # 0.5 * sin * (1.0 / 0.5)
    eventually(lambda: not client.call("lone", X, on_missing="renormalize").degraded, BACK, "cos is back")


def test_controller_is_killed(client: Client) -> None:
    pid = pid_of_actor("ControllerActor")
    with Traffic(client, "twin", np.tan(X)) as traffic:
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pids_of_actor("ControllerActor") not in ([], [pid]), BACK, "another one is there")
        eventually(lambda: client.status()["controller"]["heard_seconds_ago"] < 1.0, BACK, "the router hears it")
    assert {name for name, _ in traffic.outcomes} == {"right"}


def test_a_frozen_controller_is_told_of_and_fails_no_call(client: Client) -> None:
    pid = pid_of_actor("ControllerActor")

    def told() -> str:
        return str(client.status()["controller"].get("problem", ""))

    with Traffic(client, "twin", np.tan(X)) as traffic:
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: told() == "it does not answer", BACK, "the status says so")
            before = traffic.count("right")
            eventually(lambda: traffic.count("right") > before + 20, BACK, "calls go on")
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(lambda: client.status()["controller"]["heard_seconds_ago"] < 1.0, BACK, "the router hears it")
        assert told() == ""
    assert {name for name, _ in traffic.outcomes} == {"right"}


def test_a_replica_refuses_the_orders_of_a_replaced_controller(cluster: Cluster, client: Client) -> None:
    from expertmesh.cluster.runtime.ray_ports import fetched  # which imports Ray, whose environment the cluster has set

    eventually(lambda: len(pids_of(client, "twin/tan")) == 2, BACK, "both replicas are ready")
    replica, old = cluster._backend.handles()["twin/tan#0"], Order(0, 10**6)  # type: ignore[union-attr]
    held = fetched(replica.report.remote(), TIMEOUT).holds
    orders = [
        replica.report.remote(old),
        replica.stage.remote(old, None, None, "double", None),
        *(replica.unload.remote(old, *pair) for pair in held),
    ]
    for order in orders:
        with pytest.raises(errors.Fenced, match="another controller has taken over"):
            fetched(order, TIMEOUT)
    assert held
    assert fetched(replica.report.remote(), TIMEOUT).holds == held


def test_a_controller_that_cannot_open_its_registry_says_why_and_comes_back_when_it_can(client: Client) -> None:
    registry = run_files.state_path("faults") / "registry.sqlite"
    whole, pid = registry.read_bytes(), pid_of_actor("ControllerActor")

    def told() -> str:
        return str(client.status()["controller"].get("problem", ""))

    with Traffic(client, "twin", np.tan(X)) as traffic:
        registry.write_bytes(b"rot" * 1000)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: "the registry (registry.sqlite in state_dir) is damaged" in told(), BACK, "it says why")
        registry.write_bytes(whole)
        eventually(lambda: client.status()["controller"]["heard_seconds_ago"] < 1.0, 2 * BACK, "the router hears it")
        assert told() == ""
    assert {name for name, _ in traffic.outcomes} == {"right"}


def test_router_is_killed(client: Client) -> None:
    pid = pid_of_actor("RouterActor")
    with Traffic(client, "twin", np.tan(X)) as traffic:
        eventually(lambda: traffic.count("right") > 20, BACK, "traffic before the kill")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: traffic.count("Unavailable") + traffic.count("DeadlineExceeded"), BACK, "callers are told")
        before = traffic.count("right")
        eventually(lambda: traffic.count("right") > before + 20, BACK, "service is back on the same port")
    assert_typed_and_in_time(traffic)


def test_replacement_under_traffic_fails_nobody(cluster: Cluster, client: Client) -> None:
    eventually(lambda: len(pids_of(client, "twin/tan")) == 2, BACK, "both replicas are ready")
    before = client.status()["layers"]["twin"]["experts"]["twin/tan"]["version"]
    seen: dict[str, int] = {}
    stop = threading.Event()
    failures: list[str] = []

    def call() -> None:
        while not stop.is_set():
            try:
                reply = client.call("twin", X)
            except errors.ExpertMeshError as error:
                failures.append(repr(error))
                continue
            version = reply.versions["twin/tan"]
            seen[version] = seen.get(version, 0) + 1
            expected = np.tan(X) if version == before else np.exp(X)
            if not np.allclose(reply.output, expected):
                failures.append(f"{version} answered {reply.output}")

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    after = cluster.replace("twin/tan", Expert("numpy:exp"))
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert set(seen) == {before, after}
    assert client.call("twin", X).versions["twin/tan"] == after


def test_second_start_is_refused_and_the_first_unharmed(cluster: Cluster, client: Client) -> None:
    client.forward("twin", X)
    layer = Layer("other", gates.Fixed([1.0]), functions(sin=1))
    port = int(cluster.endpoint.rpartition(":")[2])
    with pytest.raises(errors.FailedPrecondition, match="cannot be used"):
        Cluster.start([layer], name="faults-second", port=port)
    with pytest.raises(errors.FailedPrecondition, match="already running"):
        Cluster.start([layer], name="faults", port=0)
    client.forward("twin", X)


def test_killed_driver_leaves_no_process(transport: str) -> None:
    script = """
        import sys, threading
        from expertmesh import Cluster, Expert, Layer, gates
        layer = Layer("a", gates.Fixed([1.0]), {"sin": Expert("numpy:sin")})
        with Cluster.start([layer], name="orphan", port=0, transport=sys.argv[1]) as cluster:
            print("ready", flush=True)
            threading.Event().wait()
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), transport],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert driver.stdout is not None
    assert driver.stdout.readline().strip() == "ready"
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(family) > 3
    driver.kill()
    driver.wait()

    def left() -> list[psutil.Process]:
        return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    deadline = time.monotonic() + 10
    while left() and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert left() == []
    folder = run_files.RunFile.read("orphan").ray_temp_dir
    assert folder is not None
    eventually(lambda: not Path(folder).exists(), 5, "its folder is cleared")
    lock_name("orphan").close()  # what a second start does first
    with pytest.raises(errors.NotFound):
        run_files.RunFile.read("orphan")

"""Experts come and go on Ray under load: no call fails, no answer mixes, and a killed controller leaves no half."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.changing_layer import ROWS, Ledger, Recomputed, X, expert, gate, layer
from helpers.waiting import eventually

from expertmesh import Client, Cluster, Layer
from expertmesh.experts.errors import ExpertMeshError

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::UserWarning")]
NAME = "test-layers"
EIGHT = {f"e{number}": number + 2 for number in range(8)}
ENDS = 60.0


@pytest.fixture(scope="module")
def cluster(nothing_left: None, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options: dict[str, Any] = {"transport": transport, "port": 0, "name": NAME, "routers": 2, "start_timeout": 240}
    state = tmp_path_factory.mktemp("layers") / "state"
    with Cluster.start([layer(EIGHT, pack="p")], state_dir=state, **options) as started:
        yield started


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(name=NAME) as client:
        yield client


def replicas(cluster: Cluster) -> dict[str, int]:
    return {id: seen["pid"] for id, seen in cluster.status()["replicas"].items()}


def kill_controller(cluster: Cluster) -> None:
    """SIGKILL the process of the controller of this cluster."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    (found,) = (
        process
        for process in psutil.process_iter(["pid", "cmdline"])
        if "ControllerActor" in " ".join(process.info["cmdline"] or ()) and process.pid in ours
    )
    os.kill(found.pid, signal.SIGKILL)


def test_eight_nine_eight_with_a_new_gate_each_time(cluster: Cluster, client: Client) -> None:
    ledger = Ledger()
    ledger.knows(cluster.status()["versions"], EIGHT, gate(8))
    before, pids = sorted(replicas(cluster)), set[int]()
    callers = Recomputed(client, ledger)
    with callers:
        for number in range(1, 5):
            cluster.add_expert("l/e8", expert(20 + number, num_cpus=0), gate=gate(9, number))
            nine = {**EIGHT, "e8": 20 + number}
            ledger.knows(cluster.status()["versions"], nine, gate(9, number))
            pids.add(replicas(cluster)["l/e8#0"])
            callers.go_on()
            cluster.remove_expert("l/e8", gate=gate(8, number))
            ledger.knows(cluster.status()["versions"], EIGHT, gate(8, number))
            callers.go_on()
    assert callers.problems() == []
    assert callers.unavailable == 0
    assert {len(reply.versions) for _, reply in callers.answers} == {9, 10}
    eventually(lambda: sorted(replicas(cluster)) == before, ENDS, "its replicas are ended")
    eventually(lambda: not any(map(psutil.pid_exists, pids)), ENDS, "their processes are gone")


def test_a_controller_that_is_killed_in_the_middle_leaves_the_old_layer_or_the_new(
    cluster: Cluster, client: Client
) -> None:
    ledger, chance = Ledger(), random.Random(7)
    factors, weights = dict(EIGHT), gate(8, 30)
    cluster.add_expert("l/e8", expert(9, num_cpus=0), gate=gate(9))
    cluster.remove_expert("l/e8", gate=weights)
    ledger.knows(cluster.status()["versions"], factors, weights)
    made = 0
    callers = Recomputed(client, ledger)
    with callers:
        for number in range(6):
            adds = "e8" not in factors
            wanted = {**EIGHT, "e8": 50 + number} if adds else dict(EIGHT)
            asked = gate(len(wanted), 31 + number)
            killer = threading.Timer(chance.uniform(0.0, 1.0 if adds else 0.3), kill_controller, (cluster,))
            killer.start()
            try:
                if adds:
                    cluster.add_expert("l/e8", expert(50 + number, num_cpus=0), gate=asked, timeout=ENDS)
                else:
                    cluster.remove_expert("l/e8", gate=asked, timeout=ENDS)
            except ExpertMeshError:
                eventually(lambda: settled(cluster), ENDS, "the controller is there again")
            else:
                factors, weights, made = wanted, asked, made + 1
            killer.join()
            eventually(lambda: settled(cluster), ENDS, "the controller is there again")
            ledger.knows(cluster.status()["versions"], factors, weights)
            assert [*client.status()["layers"]["l"]["experts"]] == [f"l/{name}" for name in factors]
            callers.go_on()
    assert callers.problems() == []
    assert callers.unavailable == 0
    assert made > 0


def settled(cluster: Cluster) -> bool:
    """Whether the controller knows all that was declared, and every replica runs."""
    try:
        status = cluster.status()
    except ExpertMeshError:
        return False
    return bool(status["versions"]) and all(seen["state"] == "ready" for seen in status["replicas"].values())


def test_a_layer_comes_and_goes(cluster: Cluster, client: Client) -> None:
    cluster.add_layer(Layer("m", gate(1), {"x": expert(9, num_cpus=0)}, input=ROWS))
    np.testing.assert_array_equal(client.forward("m", X), 9 * X)
    cluster.remove_layer("m")
    eventually(lambda: "m/x#0" not in replicas(cluster), ENDS, "its replica is ended")

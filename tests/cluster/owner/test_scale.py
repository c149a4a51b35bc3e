"""Scaling the experts of a cluster within this process: no call fails, and what was acknowledged outlives a restart."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.calling import Callers
from helpers.swap_cluster import IDS, SwapCluster, swap_cluster
from helpers.waiting import eventually

from expertmesh import Cluster, ConfigError, Expert, Layer, Unavailable, gates
from expertmesh.cluster.control import controller as control
from expertmesh.cluster.runtime.local_backend import _ReplicaPort
from expertmesh.cluster.state.registry import kept_replicas
from expertmesh.experts.errors import InvalidRequest, NotFound

pytestmark = pytest.mark.usefixtures("own_home")


def ready(cluster: Cluster, group: str) -> list[str]:
    """The replicas of a group that are ready."""
    found = cluster.status()["replicas"]
    return sorted(id for id, seen in found.items() if id.startswith(f"{group}#") and seen["state"] == "ready")


def test_up_and_down_under_load_no_call_fails_and_no_version_changes(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as running, Callers(lambda _: running.call()) as callers:
        cluster, before = running.cluster, running.cluster.status()
        for _ in range(3):
            assert cluster.scale("l/a", 3) == {"l/a": {"before": 1, "after": 3}}
            assert ready(cluster, "l/a") == ["l/a#0", "l/a#1", "l/a#2"]
            callers.go_on()
            assert cluster.scale({"l/a": 1, "l/b": 2}) == {
                "l/a": {"before": 3, "after": 1},
                "l/b": {"before": 1, "after": 2},
            }
            assert ready(cluster, "l/a") == ["l/a#0"]
            cluster.scale("l/b", replicas=1)
            callers.go_on()
        after = cluster.status()
        assert (after["epoch"], after["versions"]) == (before["epoch"], before["versions"])
        assert after["replicas"].keys() == before["replicas"].keys()
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-l/")]
        eventually(
            lambda: not [name for name in threads_of_experts() if "#1" in name or "#2" in name], 10, f"{threads} end"
        )


def threads_of_experts() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-l/")]


def test_a_new_replica_answers_once_it_holds_what_serves(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as running:
        running.swap({"l/a": 20, "l/b": 21})
        running.cluster.scale(dict.fromkeys(IDS, 2))
        held = {seen["id"]: seen["holds"] for seen in replicas(running)}
        assert held.keys() == {f"{id}#{copy}" for id in IDS for copy in (0, 1)}
        for id in IDS:
            assert held[f"{id}#1"] == held[f"{id}#0"] == [f"{id} {running.current()[id]}"]
        outcome = running.swap({"l/a": 22})  # every one of them stages it
        eventually(
            lambda: all(f"l/a {outcome.after['l/a']}" in seen["holds"] for seen in replicas(running, "l/a")),
            20,
            "both hold it",
        )
        running.cluster.scale("l/a", 1)
        running.swap({"l/a": 23})
        running.call()


def replicas(running: SwapCluster, *ids: str) -> list[dict[str, Any]]:
    experts = running.client.status()["layers"]["l"]["experts"]
    return [seen for id in ids or IDS for seen in experts[id]["replicas"]]


def pack_layer(replicas: int = 1, **options: Any) -> Layer:
    experts = {name: Expert(f"numpy:{name}", pack="both", replicas=replicas, **options) for name in ("sin", "cos")}
    return Layer("p", gates.Fixed([0.5, 0.5]), experts)


def start(*layers: Layer, **options: Any) -> Cluster:
    return Cluster.start(layers, transport="local", port=0, metrics_port=None, **options)


def test_an_expert_of_a_pack_stands_for_the_pack() -> None:
    with start(pack_layer()) as cluster:
        assert cluster.scale("p/both", 2) == {"p/both": {"before": 1, "after": 2}}
        assert cluster.scale({"p/sin": 3, "p/cos": 3}) == {"p/both": {"before": 2, "after": 3}}
        assert ready(cluster, "p/both") == ["p/both#0", "p/both#1", "p/both#2"]
        with pytest.raises(InvalidRequest, match="one pack"):
            cluster.scale({"p/sin": 1, "p/cos": 2})


def test_what_cannot_be_asked_for_changes_nothing() -> None:
    with start(pack_layer()) as cluster:
        with pytest.raises(NotFound, match=r"'p/tan'; known are p/both, p/cos, p/sin"):
            cluster.scale("p/tan", 2)
        for wrong in ({}, "p/sin", {"p/sin": 0}, {"p/sin": True}, {"p/sin": 1.0}, {"p/sin": 1001}, {3: 1}, None):
            with pytest.raises(InvalidRequest):
                cluster.scale(wrong)  # type: ignore[arg-type]
        assert ready(cluster, "p/both") == ["p/both#0"]


def test_what_has_no_room_is_refused_with_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(pack_layer(num_cpus=1)) as cluster:
        monkeypatch.setattr(cluster._backend, "nodes", lambda: [{"CPU": 2.0}])
        cluster.scale("p/both", 2)
        with pytest.raises(ConfigError, match="together the replicas ask for num_cpus=3, and all nodes have 2"):
            cluster.scale("p/both", 3)
        assert ready(cluster, "p/both") == ["p/both#0", "p/both#1"]


def test_a_replica_that_does_not_come_is_taken_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as running:
        backend: Any = running.cluster._backend
        stopped: list[str] = []
        was_stopped, was_waited = backend.stop_replica, backend.wait_replica

        def wait(replica_id: str, deadline: float) -> Any:
            if replica_id == "l/a#2":
                raise Unavailable("it does not answer")
            return was_waited(replica_id, deadline)

        monkeypatch.setattr(backend, "wait_replica", wait)
        monkeypatch.setattr(backend, "stop_replica", lambda id: (stopped.append(id), was_stopped(id)))
        with pytest.raises(Unavailable, match="l/a#2 is not running"):
            running.cluster.scale("l/a", 3)
        assert stopped == ["l/a#1", "l/a#2"]
        assert ready(running.cluster, "l/a") == ["l/a#0"]
        assert kept_replicas(running.state_dir) == {}
        running.call()


def test_what_was_acknowledged_comes_back_and_the_start_says_so(tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "kept", "state_dir": tmp_path / "state"}
    said: list[str] = []
    with start(pack_layer(), **options) as cluster:
        cluster.scale("p/sin", 3)
        assert kept_replicas(tmp_path / "state") == {"p/both": 3}
    line = "p/both has 3 replicas, as it was scaled; redeclare p/both to have the 2 of its declaration"
    with start(pack_layer(2), progress=said.append, **options) as cluster:
        assert len(ready(cluster, "p/both")) == 3
        assert line in said
    said.clear()
    with start(pack_layer(2), progress=said.append, redeclare=["p/cos"], **options) as cluster:
        assert len(ready(cluster, "p/both")) == 2
        assert not [told for told in said if "replicas, as it" in told]
    assert kept_replicas(tmp_path / "state") == {}


def test_a_controller_that_is_told_the_numbers_late_keeps_them(tmp_path: Path) -> None:
    with swap_cluster(tmp_path) as running:
        running.cluster.scale("l/a", 2)
        told = running.cluster._declared._desired
        backend: Any = running.cluster._backend
        backend._controller._declared = 0  # as one that has restarted
        eventually(lambda: backend._controller._declared == told.revision, 20, "it is told again")
        assert kept_replicas(running.state_dir) == {"l/a": 2}
        assert running.cluster.status()["epoch"] == 1


def test_a_replica_is_not_ended_before_it_has_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first draining turn finds a row in flight; the actor is ended only once there is none."""
    with swap_cluster(tmp_path) as running:
        running.cluster.scale("l/a", 2)
        service: Any = next(iter(running.cluster._backend._services.values()))  # type: ignore[union-attr]
        busy, ended = {"l/a#1"}, threading.Event()
        monkeypatch.setattr(service.router.view, "busy", lambda: frozenset(busy))
        scaling = threading.Thread(target=lambda: (running.cluster.scale("l/a", 1), ended.set()))
        scaling.start()
        eventually(lambda: running.cluster.status()["replicas"]["l/a#1"]["state"] == "draining", 20, "it drains")
        held = [seen for seen in replicas(running, "l/a") if seen["id"] == "l/a#1"]
        assert held
        assert not ended.wait(5 * control.DRAIN_SECONDS)
        running.call()
        busy.clear()
        scaling.join(30)
        assert ended.is_set()
        assert ready(running.cluster, "l/a") == ["l/a#0"]


def test_a_replica_that_does_not_run_holds_up_no_other_and_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = _ReplicaPort.probe

    async def down(port: _ReplicaPort, order: Any, replica_id: str, *more: Any) -> Any:
        if replica_id == "l/a#1":
            raise Unavailable("its process has ended")
        return await probe(port, order, replica_id, *more)

    with swap_cluster(tmp_path, replicas=2) as running:
        monkeypatch.setattr(_ReplicaPort, "probe", down)
        states = running.cluster.status
        eventually(lambda: states()["replicas"]["l/a#1"]["state"] == "restarting", 30, "its loss is noticed")
        assert running.cluster.scale("l/b", 3, timeout=20.0) == {"l/b": {"before": 2, "after": 3}}
        assert ready(running.cluster, "l/b") == ["l/b#0", "l/b#1", "l/b#2"]
        assert running.cluster.scale("l/a", 1, timeout=20.0) == {"l/a": {"before": 2, "after": 1}}
        assert ready(running.cluster, "l/a") == ["l/a#0"]
        running.call()

"""Replicas on Ray are started and ended under load: no call fails, every answer is right, and their processes go."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.swap_cluster import SwapCluster, X, swap_cluster
from helpers.waiting import eventually

from expertmesh import Reply
from expertmesh.cluster.state.registry import kept_replicas

pytestmark = pytest.mark.ray
ENDS = 30.0


@pytest.fixture(scope="module")
def running(nothing_left: None, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwapCluster]:
    with swap_cluster(tmp_path_factory.mktemp("scale"), transport=transport) as started:
        yield started


class Traffic:
    """Calls without pause from two threads; keeps the replies and what went wrong."""

    def __init__(self, running: SwapCluster) -> None:
        self.replies: list[Reply] = []
        self.failed: list[BaseException] = []
        self._client = running.client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(2)]

    def _call(self) -> None:
        while not self._stop.is_set():
            try:
                self.replies.append(self._client.call("l", X))
            except Exception as error:  # noqa: BLE001 (whatever it is, the test fails with it)
                self.failed.append(error)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def goes_on(self) -> None:
        before = len(self.replies)
        eventually(lambda: len(self.replies) > before + 50 or self.failed, ENDS, "calls are answered")


def pids(running: SwapCluster) -> dict[str, int]:
    """The processes of the replicas of l/a that are ready."""
    found = running.cluster.status()["replicas"]
    return {id: seen["pid"] for id, seen in found.items() if id.startswith("l/a#") and seen["state"] == "ready"}


def sockets(running: SwapCluster) -> int:
    """How many sockets of replicas there are in the folder of the cluster's run."""
    folder = Path(running.cluster._running().temp_dir or os.devnull) / "channel"
    return sum(path.is_socket() for path in folder.glob("*"))


def test_one_to_three_and_back_under_load(running: SwapCluster) -> None:
    before, ended, listening = running.cluster.status(), set[int](), sockets(running)
    with Traffic(running) as traffic:
        for _ in range(3):
            running.cluster.scale("l/a", 3)
            more = pids(running)
            assert list(more) == ["l/a#0", "l/a#1", "l/a#2"]
            traffic.goes_on()
            running.cluster.scale("l/a", 1)
            assert list(pids(running)) == ["l/a#0"]
            assert sockets(running) == listening
            ended |= set(more.values()) - set(pids(running).values())
            traffic.goes_on()
    assert not traffic.failed, traffic.failed[:3]
    assert traffic.replies
    for reply in traffic.replies:
        running.weights.check(reply)
    assert len(ended) == 6
    eventually(lambda: not [pid for pid in ended if psutil.pid_exists(pid)], ENDS, "their processes end")
    after = running.cluster.status()
    assert (after["epoch"], after["versions"]) == (before["epoch"], before["versions"])


def test_a_new_replica_takes_part_in_a_swap(running: SwapCluster) -> None:
    running.cluster.scale("l/a", 2)
    outcome = running.swap({"l/a": 30})
    held = [seen["holds"] for seen in running.client.status()["layers"]["l"]["experts"]["l/a"]["replicas"]]
    assert len(held) == 2
    assert all(f"l/a {outcome.after['l/a']}" in versions for versions in held)
    running.cluster.scale("l/a", 1)
    running.call()


def test_a_client_scales_by_way_of_the_owner_and_a_restarted_controller_keeps_it(running: SwapCluster) -> None:
    assert running.client.scale("l/b", replicas=2) == {"l/b": {"before": 1, "after": 2}}
    import ray  # once the cluster has set its environment

    controller: Any = running.cluster._backend._controller  # type: ignore[union-attr]
    ray.kill(controller, no_restart=False)
    assert running.client.scale({"l/b": 1, "l/c": 2}) == {
        "l/b": {"before": 2, "after": 1},
        "l/c": {"before": 1, "after": 2},
    }
    assert kept_replicas(running.state_dir) == {"l/a": 1, "l/b": 1, "l/c": 2}
    running.call()

"""An expert with a rule gets replicas while its rows wait, and loses them when they do not; no call fails of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from helpers.waiting import eventually

from expertmesh import Autoscale, Client, Cluster, Expert, Layer, TensorSpec, gates

RULE = Autoscale(max=3, target_queue_ms=0.5, up_after=0.5, down_after=1.0)


def slow(rows: Any) -> Any:
    """As a device of which one call at a time has the use."""
    time.sleep(0.02)
    return rows * 2


@pytest.mark.slow
def test_replicas_follow_the_load_up_and_down() -> None:
    experts = {"hot": Expert.from_function(slow, autoscale=RULE, framework="numpy"), "cold": Expert("numpy:sin")}
    layer = Layer("l", gates.Fixed([1.0, 0.0], k=1), experts, input=TensorSpec((2,), "float32"))
    x = np.ones((2, 2), np.float32)
    stop, wrong = threading.Event(), list[Any]()

    def load(client: Client) -> None:
        while not stop.is_set():
            try:
                answer = client.forward("l", x)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is reported)
                wrong.append(error)
                return
            if not np.array_equal(answer, 2 * x):
                wrong.append(answer)

    with Cluster.start([layer], port=0, transport="local") as cluster, Client(cluster.endpoint) as client:

        def hot() -> dict[str, Any]:
            scaled: dict[str, Any] = client.status()["autoscale"]["l/hot"]
            return scaled

        def ready() -> int:
            replicas = client.status()["layers"]["l"]["experts"]["l/hot"]["replicas"]
            return sum(replica["state"] == "ready" for replica in replicas)

        threads = [threading.Thread(target=load, args=(client,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: wrong or ready() >= 2, 100, "a second replica")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        assert "rows have waited more than 0.5 ms" in hot()["reason"] or hot()["down"]
        eventually(lambda: ready() == 1 == hot()["wanted"], 100, "one replica again")
        assert hot()["up"] >= 1 <= hot()["down"]
        assert client.status()["autoscale"].keys() == {"l/hot"}
        assert np.array_equal(client.forward("l", x), 2 * x)

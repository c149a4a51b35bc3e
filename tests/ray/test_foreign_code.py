"""What foreign code may do in a replica: end its process, hang, panic. It harms its own rows, and others briefly."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.waiting import eventually
from torch import Tensor

from expertmesh import Client, Cluster, Expert, Layer, errors, gates

pytestmark = pytest.mark.ray
BACK = 30.0
HANG_SECONDS = 2.0
EXITS, CRASHES, PANICS, HANGS, HOLDS_THE_LOCK, CLOSES, READS, PRINTS = range(1, 9)


def misbehaving(**options: Any) -> Expert:
    """An expert that the replicas get by value, since they cannot import this module."""

    class Panic(BaseException):
        """Stands for a panic of a Rust library."""

    def misbehaves(rows: Tensor) -> Tensor:
        """What the first number of the rows says."""
        what = int(rows[0, 0])
        if what == EXITS:
            os._exit(3)
        elif what == CRASHES:
            ctypes.string_at(0)
        elif what == PANICS:
            raise Panic
        elif what == HANGS:
            while True:
                time.sleep(1)
        elif what == HOLDS_THE_LOCK:
            re.match("(a+)+$", "a" * 64 + "b")
        elif what == CLOSES:
            sys.stdout.close()
            sys.stderr.close()
        elif what == READS:
            sys.stdin.read()
        elif what == PRINTS:
            print("x" * 200_000)
        return rows

    return Expert.from_function(misbehaves, **options)


@pytest.fixture(scope="module")
def cluster(nothing_left: None, transport: str) -> Iterator[Cluster]:
    pair = {"pack": "p", "replicas": 2}
    experts = {"bad": misbehaving(**pair), "good": Expert("torch:neg", **pair)}
    layer = Layer("l", gates.Fixed([1.0, 1.0]), experts)
    with Cluster.start([layer], name="foreign", port=0, transport=transport, hang_seconds=HANG_SECONDS) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoint, timeout=20.0) as connected:
        yield connected


def ask(client: Client, what: int, timeout: float = 20.0) -> np.ndarray[Any, Any]:
    return client.forward("l", np.full((1, 4), what, np.float32), allow=["bad"], timeout=timeout)


def replicas(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.status()["layers"]["l"]["experts"]["l/bad"]["replicas"]
    return found


def ready_pids(client: Client) -> set[int]:
    """The processes of the replicas that answer: a new one is ready before it has loaded anything."""
    return {
        replica["pid"] for replica in replicas(client) if replica["state"] == "ready" and len(replica["holds"]) == 2
    }


def others_are_served(client: Client) -> bool:
    x = np.ones((1, 4), np.float32)
    try:
        return bool((client.forward("l", x, allow=["good"]) == -x).all())
    except errors.Unavailable:
        return False


@pytest.fixture(autouse=True)
def whole(client: Client) -> None:
    eventually(lambda: len(ready_pids(client)) == 2, BACK, "both replicas are ready")


@pytest.mark.parametrize("what", [EXITS, CRASHES])
def test_rows_that_end_two_replicas_are_not_sent_to_more_and_both_come_back(client: Client, what: int) -> None:
    before = ready_pids(client)
    with pytest.raises(errors.ExpertFailed, match="l/bad ended its process: 2 replicas died while they computed"):
        ask(client, what)
    eventually(lambda: len(ready_pids(client) - before) == 2, BACK, "both are replaced")
    eventually(lambda: others_are_served(client), BACK, "the other expert of the pack is served")
    assert ask(client, 0).shape == (1, 4)


@pytest.mark.parametrize(("what", "failure"), [(PANICS, "l/bad raised Panic"), (CLOSES, ""), (READS, ""), (PRINTS, "")])
def test_what_ends_no_process_harms_nobody_else(client: Client, what: int, failure: str) -> None:
    before = ready_pids(client)
    for _ in range(6):  # so that each replica has its turn
        if failure:
            with pytest.raises(errors.ExpertFailed, match=failure):
                ask(client, what)
        else:
            with contextlib.suppress(errors.ExpertFailed):  # what it printed to, or read from, may be closed
                ask(client, what)
        assert others_are_served(client)
    assert ready_pids(client) == before


@pytest.mark.parametrize("what", [HANGS, HOLDS_THE_LOCK])
def test_an_expert_that_never_returns_is_ended_and_the_others_of_its_pack_are_served(
    cluster: Cluster, client: Client, what: int
) -> None:
    before = ready_pids(client)
    with pytest.raises(errors.ExpertMeshError):
        ask(client, what, timeout=1.0)
    eventually(lambda: others_are_served(client), BACK, "the other expert of the pack is served")
    eventually(lambda: len(ready_pids(client) - before) >= 1 and len(ready_pids(client)) == 2, BACK, "it is replaced")
    assert others_are_served(client)
    if what == HANGS:
        log = Path(os.environ["EXPERTMESH_HOME"]) / "log" / "foreign.jsonl"
        assert "the replica's process is ended: l/bad has not returned for" in log.read_text()


def test_a_frozen_replica_fails_no_call_while_its_sibling_serves(client: Client) -> None:
    pid = min(ready_pids(client))
    x = np.full((1, 4), 0.5, np.float32)
    for _ in range(50):
        client.forward("l", x)
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(200):
            assert (client.forward("l", x, timeout=10.0) == 0).all()
        assert client.status()["router"]["hedges"] > 0
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: pid in ready_pids(client) or len(ready_pids(client)) == 2, BACK, "it serves again")
    for _ in range(50):
        client.forward("l", x)

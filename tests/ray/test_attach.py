"""A process of its own attaches to a cluster on Ray: it answers right, follows swaps, and its end holds up none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.swap_cluster import GATE, NAME, SwapCluster, X, swap_cluster
from helpers.waiting import eventually

from expertmesh import Reply
from expertmesh.experts.errors import Aborted, Unavailable

pytestmark = pytest.mark.ray
LEASE = 10.0
CALLER = """
import json, sys, threading
import numpy as np
import expertmesh

X, stop, seen = np.array(json.loads(sys.argv[2]), np.float32), threading.Event(), []

def call():
    try:
        reply = router.call("l", X, timeout=20.0)
        return {"output": reply.output.tolist(), "versions": reply.versions, "epoch": reply.epoch}
    except expertmesh.ExpertMeshError as error:
        return {"error": repr(error)}

def calls():
    while not stop.is_set():
        seen.append(call())

with expertmesh.attach(sys.argv[1]) as router:
    print(json.dumps({"name": router.name, "status": router.status()}), flush=True)
    thread = threading.Thread(target=calls)
    for line in sys.stdin:
        if line.strip() == "begin":
            thread.start()
        if line.strip() == "end":
            stop.set()
            thread.join()
        print(json.dumps(seen if line.strip() == "end" else call()), flush=True)
"""


class Caller:
    """A process that has attached, and calls when it is told."""

    def __init__(self) -> None:
        words = (sys.executable, "-c", CALLER, NAME, json.dumps(X.tolist()))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said = self._read()

    def tell(self, word: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> int:
        """Let it leave in good order; returns its exit status."""
        self.process.communicate(timeout=60)
        return self.process.returncode

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@contextmanager
def calling() -> Iterator[Caller]:
    caller = Caller()
    try:
        yield caller
    finally:
        caller.process.kill()
        caller.process.communicate()


@pytest.fixture(scope="module")
def running(nothing_left: None, transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwapCluster]:
    with swap_cluster(tmp_path_factory.mktemp("attach"), transport=transport) as cluster:
        yield cluster


def check(running: SwapCluster, told: dict[str, Any]) -> dict[str, str]:
    """Recompute an answer; returns the versions that gave it."""
    assert "error" not in told, told
    output = np.array(told["output"], np.float32)
    known: dict[str, Any] = {"degraded": False, "missing": [], "lost_mass": None, "max_lost_mass": 0.0, "dropped": 0}
    running.weights.check(Reply(output=output, epoch=told["epoch"], versions=told["versions"], request_id="", **known))
    versions: dict[str, str] = told["versions"]
    return versions


def seeds(number: int) -> dict[str, int]:
    return {"l/a": number, "l/b": number + 1, "l/c": number + 2, GATE: number}


def members(running: SwapCluster) -> list[str]:
    """The attached routers that the cluster knows."""
    return [name for name in running.client.status()["routers"] if name.startswith("attached-")]


def answered(caller: Caller) -> dict[str, Any]:
    """The answer of a caller, as soon as its router may give one."""
    told: dict[str, Any] = {}

    def done() -> bool:
        told.clear()
        told.update(caller.tell("call"))
        assert "Unavailable" in told.get("error", "Unavailable"), told
        return "error" not in told

    eventually(done, 30, "it answers")
    return told


def swapped(running: SwapCluster, number: int) -> Any:
    """The outcome of a swap, as soon as the controller is there and knows what routers pin."""
    outcomes: list[Any] = []

    def done() -> bool:
        with suppress(Aborted, Unavailable):
            outcomes.append(running.swap(seeds(number)))
        return bool(outcomes)

    eventually(done, 60, "it is swapped")
    return outcomes[0]


def test_it_answers_and_follows_swaps_and_leaves(running: SwapCluster) -> None:
    with calling() as caller:
        assert caller.said["status"]["router"]["pid"] == caller.process.pid
        check(running, caller.tell("call"))
        assert members(running) == [caller.said["name"]]
        caller.tell("begin")
        for number in range(10, 18):
            outcome = running.swap(seeds(number))
            told = caller.tell("call")
            used = check(running, told)
            assert told["epoch"] == outcome.epoch
            assert used.items() <= running.current().items()
        seen = caller.tell("end")
        assert len(seen) > 8
        for told in seen:
            check(running, told)
        assert [told["epoch"] for told in seen] == sorted(told["epoch"] for told in seen)
        assert caller.end() == 0
        assert members(running) == []


def test_one_that_is_killed_holds_up_no_swap_for_longer_than_its_lease(running: SwapCluster) -> None:
    with calling() as caller:
        caller.tell("begin")
        caller.process.send_signal(signal.SIGKILL)
        running.swap(seeds(20), timeout=LEASE + 30)
        eventually(lambda: members(running) == [], LEASE + 20, "it is forgotten")
        for number in (30, 40):
            swapped(running, number)
            running.call()


def test_one_that_was_frozen_answers_from_no_epoch_that_is_over(running: SwapCluster) -> None:
    with calling() as caller:
        check(running, caller.tell("call"))
        caller.process.send_signal(signal.SIGSTOP)
        outcome = running.swap(seeds(50), timeout=LEASE + 30)
        caller.process.send_signal(signal.SIGCONT)
        told = answered(caller)
        check(running, told)
        assert told["epoch"] == outcome.epoch
        assert caller.end() == 0


def test_it_serves_on_while_the_controller_is_killed_and_misses_no_swap_of_the_next(running: SwapCluster) -> None:
    with calling() as caller:
        (controller,) = (
            process for process in psutil.Process().children(recursive=True) if "ControllerActor" in process.name()
        )
        controller.kill()
        for _ in range(20):
            check(running, caller.tell("call"))
        for number in (60, 70, 80):
            outcome = swapped(running, number)
            told = answered(caller)
            check(running, told)
            assert told["epoch"] == outcome.epoch
        assert members(running) == [caller.said["name"]]
        assert caller.end() == 0

"""Processes that stop without dying (SIGSTOP): a replica beside a healthy one, the router, the controller."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.chaos.figures import judged
from benchmarks.chaos.load import Load
from benchmarks.chaos.mesh import Mesh, chaos_mesh, processes

from expertmesh import errors

from .scenario import Scenario, Seen

FROZEN_SECONDS = 8.0
CALLERS = 16
SHAPE: dict[str, Any] = {"experts": 2, "replicas": 2}


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Freeze a process for as long as this is entered."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def replica() -> Seen:
    """One of two replicas of each expert is frozen under load."""
    seen = Seen()
    with chaos_mesh("frozen-replica", **SHAPE) as mesh:
        load = _callers(mesh)
        with load:
            time.sleep(4)
            with stopped(mesh.pids()[mesh.shape.expert_ids[0]][0]):
                time.sleep(FROZEN_SECONDS)
            time.sleep(4)
        _judge(seen, mesh, load)
    return seen


def router() -> Seen:
    """The router is frozen for less than the calls' deadline, and so is a swap on its way."""
    seen = Seen()
    with chaos_mesh("frozen-router", **SHAPE) as mesh:
        load = _callers(mesh, timeout=20.0)
        (pid,) = [process.pid for process in processes("RouterActor")]
        with load:
            time.sleep(3)
            with stopped(pid):
                time.sleep(4)
            time.sleep(4)
        _judge(seen, mesh, load)
    return seen


def controller() -> Seen:
    """The controller is frozen in the middle of swaps: answers go on, and no swap is undone."""
    seen = Seen()
    with chaos_mesh("frozen-controller", **SHAPE) as mesh:
        (pid,) = [process.pid for process in processes("ControllerActor")]
        outcomes: Counter[str] = Counter()
        over = threading.Event()
        swapping = threading.Thread(target=_swap_on, args=(mesh, outcomes, over))
        load = _callers(mesh)
        with load:
            swapping.start()
            time.sleep(3)
            with stopped(pid):
                time.sleep(FROZEN_SECONDS)
            time.sleep(4)
            over.set()
            swapping.join()
        seen.note("swaps: " + ", ".join(f"{number} {name}" for name, number in outcomes.items()), bool(outcomes["ok"]))
        serving = mesh.state()["versions"]
        lost = [id for id, version in mesh.ledger.current.items() if serving[id] != version]
        seen.note(f"{len(lost)} acknowledged swaps undone", not lost)
        _judge(seen, mesh, load)
    return seen


def _swap_on(mesh: Mesh, outcomes: Counter[str], over: threading.Event) -> None:
    """Swap one expert after the other; one whose outcome is not known is asked for again under the same id."""
    number = 0
    while not over.is_set():
        id = mesh.shape.expert_ids[number % len(mesh.shape.expert_ids)]
        number += 1
        path, tensors = mesh.make(id)
        for _ in range(10):
            try:
                done = mesh.client.swap({id: path}, swap_id=f"frozen-{number}", timeout=10.0)
            except errors.Aborted:
                outcomes["aborted"] += 1
                break
            except errors.ExpertMeshError as error:
                outcomes[type(error).__name__] += 1
                time.sleep(0.5)
            else:
                mesh.ledger.committed(done.epoch, done.after, {id: tensors})
                outcomes["ok"] += 1
                break
        time.sleep(0.2)


def _callers(mesh: Mesh, timeout: float = 10.0) -> Load:
    return Load(mesh.cluster.endpoint, mesh.shape.layer, callers=CALLERS, timeout=timeout)


def _judge(seen: Seen, mesh: Mesh, load: Load) -> None:
    found = judged(mesh.checker(), load)
    bad = found["wrong"] + found["mixed"] + found["went back"]
    seen.note(f"{found['requests']} answers recomputed: {found['wrong']} wrong, {found['mixed']} mixed", not bad)
    kinds = Counter(one.error.partition(":")[0] for one in load.seen if one.error)
    told = ", ".join(f"{number} {name}" for name, number in kinds.items())
    seen.note(f"{found['failed']} failed {told}".rstrip(), not found["failed"])


SCENARIOS = (
    Scenario("frozen replica", "0 calls fail while a sibling is healthy; 0 wrong, 0 mixed", replica),
    Scenario("frozen router", "calls whose deadline is later than the thaw are answered; 0 wrong", router),
    Scenario("frozen controller", "answers go on; no acknowledged swap is undone; 0 wrong, 0 mixed", controller),
)

"""`chaos-routers`: two routers and an attached one, killed and frozen under load and swaps; answers are recomputed."""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.figures import behind, judged, say
from benchmarks.chaos.load import Load
from benchmarks.chaos.mesh import CALL_SECONDS, Mesh, chaos_mesh, wait_until
from benchmarks.chaos.swaps import KINDS, Swapper, make_swap

from expertmesh import Client

from .attached import Attached

LEASE_SECONDS = 11.0
"""A router that is not heard holds up a swap for its lease of 10 s, and 1 s more."""

LEFT_SECONDS = 30.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this experiment."""
    parser.add_argument("--seconds", type=float, default=60.0, help="of swaps, and of kills")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--every", type=float, default=10.0, help="seconds from one kill of a router to the next")
    parser.add_argument("--frozen", type=float, default=20.0, help="seconds that a router is stopped")
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second of each of the loads")
    parser.add_argument("--only", nargs="*", choices=PARTS)


@dataclass
class Acknowledged:
    """Swaps one after another from a thread of its own: when each was acknowledged, as (time, epoch)."""

    mesh: Mesh
    pace: float
    most: int | None = None
    swapper: Swapper = field(init=False)
    times: list[tuple[float, int]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.swapper = Swapper(self.mesh)
        draw = random.Random(len(self.mesh.ledger.epochs))
        self._made = (make_swap(self.mesh, KINDS[n % len(KINDS)], draw) for n in range(self.most or 10**6))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Acknowledged:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def join(self) -> None:
        """Wait for the last swap of `most`."""
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        for made in self._made:
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            began = time.monotonic()
            if self.swapper.swap(made, timeout=40.0) == "committed":
                self.times.append((time.monotonic(), self.swapper.epochs[-1]))
            self.spans.append((began, time.monotonic()))
            due += self.pace

    def longest(self, begin: float, end: float) -> float:
        """The most seconds that a swap took which was under way in a span."""
        return max((done - began for began, done in self.spans if began < end and done > begin), default=0.0)


def run(options: argparse.Namespace) -> list[str]:
    """Every part that is wanted."""
    problems: list[str] = []
    with chaos_mesh("chaos-routers", experts=4, replicas=2, settings={"routers": 2}) as mesh:
        mesh.client.close()
        mesh.client = Client(mesh.cluster.endpoints, timeout=CALL_SECONDS)
        for part in options.only or PARTS:
            print(f"-- {part}", flush=True)
            problems += [f"{part}: {problem}" for problem in PARTS[part](mesh, options)]
    return problems


@contextmanager
def loaded(mesh: Mesh, rate: float, file: str) -> Iterator[dict[str, Any]]:
    """Load by clients of both routers, of each alone, and by an attached one; all are complete after that."""
    both, layer = mesh.cluster.endpoints, mesh.shape.layer
    loads: dict[str, Any] = {"both": Load(both, layer, rate=rate)}  # type: ignore[arg-type]
    loads |= {f"router-{number}": Load(endpoint, layer, rate=rate) for number, endpoint in enumerate(both)}
    attached = Attached(mesh.cluster.config.name, layer, rate, mesh.folder / file)
    with ExitStack() as stack:
        for load in loads.values():
            stack.enter_context(load)
        loads["attached"] = attached
        yield loads
    if attached.process.poll() is None and attached.end():
        raise RuntimeError(f"the attached process ended with {attached.process.returncode}")


def said(mesh: Mesh, loads: Mapping[str, Any], acked: Acknowledged, may_fail: Iterable[str] = ()) -> list[str]:
    """Judge every answer, and say what was found; failures are none but of those who may see some."""
    problems = []
    say("swaps acknowledged, of them sets, with the gate", _kinds(acked.swapper))
    say("answers recomputed: right / failed / wrong / mixed / stale", "")
    for name, load in loads.items():
        found = judged(mesh.checker(), load)
        late = behind(load.seen, acked.times)  # of what was acknowledged to anybody
        line = " / ".join(str(found[key]) for key in ("right", "failed", "wrong", "mixed"))
        say(f"  {name}", f"{line} / {late}", "failures may be" if name in may_fail else "")
        bad = found["wrong"] + found["mixed"] + late + (0 if name in may_fail else found["failed"])
        problems += [f"{name}: {bad} answers failed or were wrong, mixed or stale"] if bad else []
        problems += [] if found["right"] > 50 else [f"{name}: only {found['right']} answers"]
        for example in {one.error for one in load.seen if one.error and name not in may_fail}:
            print(f"    {example}")
    for refusal in acked.swapper.refused[:3]:
        print(f"    swap refused: {refusal}")
    return problems


def swaps(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """So many swaps in so many seconds."""
    with loaded(mesh, options.rate, "swaps") as loads:
        began = time.monotonic()
        with Acknowledged(mesh, 0.95 * options.seconds / options.swaps, options.swaps) as acked:
            acked.join()
        took = time.monotonic() - began
    problems = said(mesh, loads, acked)
    say("seconds", took, f"<= {options.seconds:g}")
    if len(acked.times) < options.swaps or took > options.seconds:
        problems.append(f"{len(acked.times)} of {options.swaps} swaps in {took:.1f} s")
    return problems


def kills(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """SIGKILL of one router after the other."""
    killed: list[float] = []
    with loaded(mesh, options.rate, "kills") as loads, Acknowledged(mesh, 1.0) as acked:
        begin = time.monotonic()
        while time.monotonic() - begin < options.seconds:
            time.sleep(options.every / 2)
            os.kill(pid(mesh, f"router-{len(killed) % 2}"), signal.SIGKILL)
            killed.append(time.monotonic())
            time.sleep(options.every / 2)
        wait_until(lambda: ready(mesh) or None, LEFT_SECONDS, "both routers are back")
    problems = said(mesh, loads, acked, may_fail=("router-0", "router-1"))
    say("routers killed", len(killed), f"one in {options.every:g} s")
    longest = acked.longest(begin, time.monotonic())
    say("longest swap, s", longest, f"<= {LEASE_SECONDS:g}")
    return problems + ([f"a swap took {longest:.1f} s"] if longest > LEASE_SECONDS else [])


def freeze(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """SIGSTOP of a router."""
    with loaded(mesh, options.rate, "freeze") as loads, Acknowledged(mesh, 0.5) as acked:
        time.sleep(3.0)
        problems = frozen(acked, pid(mesh, "router-1"), options.frozen)
        wait_until(lambda: ready(mesh) or None, LEFT_SECONDS, "both routers are back")
        time.sleep(3.0)
    return [*said(mesh, loads, acked, may_fail=("router-1",)), *problems]


def attached(mesh: Mesh, options: argparse.Namespace) -> list[str]:
    """SIGSTOP, then SIGKILL, of an attached router."""
    with loaded(mesh, options.rate, "attached") as loads, Acknowledged(mesh, 0.5) as acked:
        time.sleep(3.0)
        problems = frozen(acked, loads["attached"].process.pid, options.frozen)
        time.sleep(5.0)
        loads["attached"].process.kill()
        killed = time.monotonic()
        time.sleep(LEASE_SECONDS + 4.0)
        longest = acked.longest(killed, time.monotonic())
        say("longest swap after SIGKILL, s", longest, f"<= {LEASE_SECONDS:g}")
        if longest > LEASE_SECONDS:
            problems.append(f"a swap took {longest:.1f} s after SIGKILL")
    return [*said(mesh, loads, acked, may_fail=("attached",)), *problems]


PARTS = {"swaps": swaps, "kills": kills, "freeze": freeze, "attached": attached}


def frozen(acked: Acknowledged, process: int, seconds: float) -> list[str]:
    """Stop a process for a while; what is wrong with the swaps meanwhile."""
    begin = time.monotonic()
    os.kill(process, signal.SIGSTOP)
    try:
        time.sleep(seconds)
        committed = sum(begin + LEASE_SECONDS < moment < begin + seconds for moment, _ in acked.times)
        longest = acked.longest(begin, time.monotonic())
    finally:
        os.kill(process, signal.SIGCONT)
    say("longest swap while it was frozen, s", longest, f"<= {LEASE_SECONDS:g}")
    say("swaps after its lease, while it was frozen", committed, ">= 1")
    if longest > LEASE_SECONDS or not committed:
        return [f"a swap took {longest:.1f} s, and {committed} were made after the lease"]
    return []


def pid(mesh: Mesh, router: str) -> int:
    """The process of a router."""
    pid: int = wait_until(lambda: mesh.cluster.status()["routers"][router].get("pid"), LEFT_SECONDS, f"{router} is up")
    return pid


def ready(mesh: Mesh) -> bool:
    """Whether every router that the owner has declared is ready."""
    found = mesh.cluster.status()["routers"]
    return all(found[f"router-{number}"]["state"] == "ready" for number in range(2))


def _kinds(swapper: Swapper) -> str:
    return f"{len(swapper.committed)}, {swapper.count('set', 'gate')}, {swapper.count('gate')}"

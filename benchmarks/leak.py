"""Starts, stops and kills in great number, after which nothing may be left.

    python -m benchmarks.leak [--starts 10] [--layers 200] [--kills 46] [--drivers 4] [--seed 0]

Counted before and after each part: processes below this one, shared memory, files and folders for temporary things,
listening and Unix sockets, and this process's own descriptors and threads, apart from those that Ray itself keeps.
While replicas are killed, the router's descriptors and threads are counted too.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmarks.home import own_home

from expertmesh import Client, Cluster, Expert, ExpertMeshError, Layer, gates

SETTLE_SECONDS = 20.0
TCP_CLOSE = 7
KEPT_BY_RAY = 2
"""Connections of a driver for each start and stop of Ray: its own to the head, and the head's to it."""

BATCH = 10
DRIVER = """
import sys
from expertmesh import Cluster, Expert, Layer, gates
with Cluster.start([Layer("d", gates.Fixed([1.0]), {"e": Expert("torch:sin")})], name="leak-driver", port=0) as cluster:
    print("up", flush=True)
    sys.stdin.read()
"""


def layer(name: str, replicas: int = 1) -> Layer:
    return Layer(name, gates.Fixed([1.0]), {"e": Expert("torch:sin", replicas=replicas)})


def left_over() -> dict[str, set[str]]:
    """What this machine has of ours, by kind."""
    me = psutil.Process()
    children = {str(p.pid) for p in me.children(recursive=True) if _cause(p)}
    temporary = {p.name for p in Path(tempfile.gettempdir()).glob("expertmesh-*")}
    shared = {p.name for p in Path("/dev/shm").iterdir()}
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    sockets = {line.split()[-1] for line in lines if "expertmesh-" in line}
    return {"processes": children, "temporary folders": temporary, "shared memory": shared, "sockets": sockets}


def _cause(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def descriptors() -> tuple[int, int]:
    """Open descriptors of this process: without, and only, the connections that Ray's core keeps open.

    Those are connections between driver and head of a Ray that was shut down: TCP, closed at both ends, on the node's
    own address, where nothing of ours connects (seen with strace, Ray 2.60). Ray alone keeps them too.
    """
    ours = theirs = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = entry.readlink().name
        except OSError:  # the one that lists this folder is gone by now
            continue
        kept = target.startswith("socket:") and _closed(int(entry.name))
        ours, theirs = ours + (not kept), theirs + kept
    return ours, theirs


def _closed(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as held:
        if held.family not in (socket.AF_INET, socket.AF_INET6) or held.type != socket.SOCK_STREAM:
            return False
        if held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE:
            return False
        host, port = held.getsockname()[:2]
        return port != 0 and not ip_address(host.removeprefix("::ffff:")).is_loopback


@contextmanager
def nothing_left(part: str, problems: list[str], starts_of_ray: int = 1) -> Iterator[None]:
    """Compare before and after; what is left after a while is a problem, apart from what so many starts of Ray keep."""
    before, own = left_over(), (*descriptors(), threading.active_count())
    begin = time.monotonic()
    yield
    seconds, deadline = time.monotonic() - begin, time.monotonic() + SETTLE_SECONDS
    while True:
        more = {kind: found - before[kind] for kind, found in left_over().items() if found - before[kind]}
        if not more or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    now = (*descriptors(), threading.active_count())
    print(f"{part:<34} {seconds:6.0f} s   left: {more or 'nothing'}; descriptors {own[0]} -> {now[0]} "
          f"(kept by Ray {own[1]} -> {now[1]}), threads {own[2]} -> {now[2]}", flush=True)  # fmt: skip
    problems.extend(f"{part}: {kind} left: {sorted(found)[:5]}" for kind, found in more.items())
    if now[0] > own[0] + 3 or now[1] > own[1] + KEPT_BY_RAY * starts_of_ray or now[2] > own[2] + 2:
        problems.append(f"{part}: descriptors (ours, Ray's), threads {own} -> {now}")


def full_starts(count: int) -> None:
    """Whole clusters with a Ray of their own."""
    for _ in range(count):
        with Cluster.start([layer("s")], name="leak-start", port=0) as cluster, Client(cluster.endpoint) as client:
            client.forward("s", np.ones((1, 4), np.float32))


def layer_starts(count: int) -> None:
    """Layers that come and go, `BATCH` at a time, inside one Ray that runs on."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for _ in range(0, count, BATCH):
            layers = [layer(f"l{number}") for number in range(BATCH)]
            cluster = Cluster.start(layers, name="leak-layers", port=0, address="auto")
            with cluster, Client(cluster.endpoint) as client:
                for declared in layers:
                    client.forward(declared.name, np.ones((1, 4), np.float32))
    finally:
        ray.shutdown()


def kills(count: int, draw: random.Random, problems: list[str]) -> None:
    """SIGKILL of replicas, router and controller at random moments, under load."""
    cluster = Cluster.start([layer("k", replicas=2), layer("m")], name="leak-kill", port=0)
    with cluster, Client(cluster.endpoint, timeout=60.0) as client:
        router = client.status()["router"]["pid"]
        before = _own(router)
        routers = 0
        for number in range(count):
            replicas = cluster.status()["replicas"]
            roles = ["replica"] * 8 + ["router"]
            role = draw.choice(roles) if number < count - 8 else "replica"
            pid = router if role == "router" else draw.choice([r["pid"] for r in replicas.values()])
            _kill(pid)
            time.sleep(draw.uniform(0.0, 1.0))
            _until(lambda: _answers(client), 60.0)
            if role == "router":
                routers += 1
                router = client.status()["router"]["pid"]
        _until(lambda: all(r["state"] == "ready" for r in cluster.status()["replicas"].values()), 60.0)
        time.sleep(1.0)
        after = _own(router)
        print(f"  router (killed {routers} of {count}): descriptors, threads {before} -> {after}")
        if after[0] > before[0] + 8 or after[1] > before[1] + 4:
            problems.append(f"the router grew from {before} to {after} descriptors and threads")


def driver_kills(count: int, draw: random.Random) -> None:
    """SIGKILL of the process that owns everything."""
    for _ in range(count):
        process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if draw.random() < 0.5 and process.stdout is not None:
            process.stdout.readline()  # up
        else:
            time.sleep(draw.uniform(2.0, 5.0))  # somewhere in its start
        process.kill()
        process.communicate()


def _own(pid: int) -> tuple[int, int]:
    process = psutil.Process(pid)
    return process.num_fds(), process.num_threads()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _answers(client: Client) -> bool:
    try:
        client.forward("k", np.ones((1, 4), np.float32), timeout=5.0)
        client.forward("m", np.ones((1, 4), np.float32), timeout=5.0)
    except ExpertMeshError:
        return False
    return True


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.1)


def main() -> int:
    """Run all parts; 0 when nothing is left."""
    options, problems = _options(), []
    draw = random.Random(options.seed)
    with own_home():
        full_starts(1)  # what is made once and kept: threads of gRPC, imports
        with nothing_left(f"{options.starts} full starts and stops", problems, options.starts):
            full_starts(options.starts)
        with nothing_left(f"{options.kills} kills of replicas and routers", problems):
            kills(options.kills, draw, problems)
        with nothing_left(f"{options.drivers} kills of drivers", problems):
            driver_kills(options.drivers, draw)
        with nothing_left(f"{options.layers} layers in one Ray", problems):
            layer_starts(options.layers)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leak", description=__doc__.partition("\n")[0])
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--kills", type=int, default=46)
    parser.add_argument("--drivers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

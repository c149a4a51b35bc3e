"""Starts, stops and kills in great number, after which nothing may be left.

    python -m benchmarks.leak [--starts 10] [--layers 200] [--kills 46] [--drivers 4] [--seed 0]

Counted before and after each part: processes below this one, shared memory, files and folders for temporary things,
listening and Unix sockets, and this process's own descriptors and threads, apart from those that Ray itself keeps.
While replicas are killed, the router's descriptors and threads are counted too.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmarks.chaos.mesh import command_lines, wait_until
from benchmarks.home import own_home

from expertmesh import Client, Cluster, Expert, Layer, gates

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
X = np.ones((1, 4), np.float32)


def layer(name: str, replicas: int = 1) -> Layer:
    return Layer(name, gates.Fixed([1.0]), {"e": Expert("torch:sin", replicas=replicas)})


def left_over() -> dict[str, set[str]]:
    """What this machine has of ours, by kind."""
    unix = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {
        "processes": {str(own.pid) for own, words in command_lines().items() if "resource_tracker" not in words},
        "temporary folders": {path.name for path in Path(tempfile.gettempdir()).glob("expertmesh-*")},
        "shared memory": {path.name for path in Path("/dev/shm").iterdir()},
        "sockets": {line.split()[-1] for line in unix if "expertmesh-" in line},
    }


def own() -> tuple[int, int, int]:
    """Of this process: open descriptors without, and only, the connections that Ray's core keeps open; threads.

    Those are connections between driver and head of a Ray that was shut down: TCP, closed at both ends (seen with
    strace, Ray 2.60). Ray alone keeps them too, at most `KEPT_BY_RAY` for each start: more would be ours. Our clients
    come by Unix sockets.
    """
    ours = theirs = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists this folder is gone by now
            kept = entry.readlink().name.startswith("socket:") and _closed(int(entry.name))
            ours, theirs = ours + (not kept), theirs + kept
    return ours, theirs, threading.active_count()


def _closed(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as held:
        if held.family not in (socket.AF_INET, socket.AF_INET6) or held.type != socket.SOCK_STREAM:
            return False
        if held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE:
            return False
        return bool(held.getsockname()[1] != 0)


@contextmanager
def nothing_left(part: str, problems: list[str], starts_of_ray: int = 1) -> Iterator[None]:
    """Compare before and after; what is left after a while is a problem, apart from what so many starts of Ray keep."""
    kinds, before, begin = left_over(), own(), time.monotonic()
    yield
    seconds, more = time.monotonic() - begin, {}

    def settled() -> bool:
        nonlocal more
        more = {kind: found - kinds[kind] for kind, found in left_over().items() if found - kinds[kind]}
        return not more

    with suppress(TimeoutError):
        wait_until(settled, SETTLE_SECONDS, "nothing is left", pause=0.2)
    now = own()
    print(f"{part:<34} {seconds:6.0f} s   left: {more or 'nothing'}; descriptors {before[0]} -> {now[0]} "
          f"(kept by Ray {before[1]} -> {now[1]}), threads {before[2]} -> {now[2]}", flush=True)  # fmt: skip
    problems.extend(f"{part}: {kind} left: {sorted(found)[:5]}" for kind, found in more.items())
    allowed = (3, KEPT_BY_RAY * starts_of_ray, 2)
    if any(after > first + most for first, after, most in zip(before, now, allowed, strict=True)):
        problems.append(f"{part}: descriptors (ours, Ray's), threads {before} -> {now}")


def full_starts(count: int) -> None:
    """Whole clusters with a Ray of their own."""
    for _ in range(count):
        with Cluster.start([layer("s")], name="leak-start", port=0) as cluster, Client(cluster.endpoint) as client:
            client.forward("s", X)


def layer_starts(count: int) -> None:
    """Layers that come and go, `BATCH` at a time, inside one Ray that runs on."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        for _ in range(0, count, BATCH):
            layers = [layer(f"l{number}") for number in range(BATCH)]
            cluster = Cluster.start(layers, name="leak-layers", port=0, address="auto")
            with cluster, Client(cluster.endpoint) as client:
                for declared in layers:
                    client.forward(declared.name, X)
    finally:
        ray.shutdown()


def kills(count: int, draw: random.Random, problems: list[str]) -> None:
    """SIGKILL of replicas, router and controller at random moments, under load."""
    cluster = Cluster.start([layer("k", replicas=2), layer("m")], name="leak-kill", port=0)
    with cluster, Client(cluster.endpoint, timeout=60.0) as client:

        def answers() -> bool:
            client.forward("k", X, timeout=5.0)
            client.forward("m", X, timeout=5.0)
            return True

        router = psutil.Process(client.status()["router"]["pid"])
        before, routers = (router.num_fds(), router.num_threads()), 0
        for number in range(count):
            replicas = cluster.status()["replicas"]
            role = draw.choice(["replica"] * 8 + ["router"]) if number < count - 8 else "replica"
            pid = router.pid if role == "router" else draw.choice([r["pid"] for r in replicas.values()])
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
            time.sleep(draw.uniform(0.0, 1.0))
            wait_until(answers, 60.0, "both layers answer", pause=0.1)
            if role == "router":
                routers += 1
                router = psutil.Process(client.status()["router"]["pid"])
        wait_until(lambda: _all_ready(cluster), 60.0, "every replica is ready", pause=0.1)
        time.sleep(1.0)
        after = router.num_fds(), router.num_threads()
        print(f"  router (killed {routers} of {count}): descriptors, threads {before} -> {after}")
        if after[0] > before[0] + 8 or after[1] > before[1] + 4:
            problems.append(f"the router grew from {before} to {after} descriptors and threads")


def _all_ready(cluster: Cluster) -> bool:
    return all(replica["state"] == "ready" for replica in cluster.status()["replicas"].values())


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


def main() -> int:
    """Run all parts; 0 when nothing is left."""
    options, problems = _options(), list[str]()
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
    for name, number in {"starts": 10, "layers": 200, "kills": 46, "drivers": 4, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Checks whether a cluster can run on this machine: each check is ok, warn or fail, and says how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .facts import Machine
from .run_files import RunFile

State = Literal["ok", "warn", "fail"]

BASE: Mapping[str, str] = {"numpy": "1.26", "grpcio": "1.66", "msgpack": "1.2.1"}
CLUSTER: Mapping[str, str] = {
    "ray": "2.56",
    "torch": "2.10",
    "safetensors": "0.5",
    "click": "8.1",
    "rich": "13.7",
    "pyyaml": "6.0",
    "pydantic": "2.9",
    "prometheus-client": "0.20",
    "psutil": "6.0",
}
DEMO: Mapping[str, str] = {"scikit-learn": "1.5"}
EXAMPLES: Mapping[str, str] = {
    "babel": "2.16", "tokenizers": "0.20", "sacrebleu": "2.4", "pillow": "10.3", "matplotlib": "3.9",
}  # fmt: skip
PACKAGES = (*BASE, *CLUSTER, *DEMO, *EXAMPLES)
OPTIONAL = ("[demo]", "[examples]")
PYTHON = (3, 10)
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """The result of one check. `mend` says how to fix it if it is not ok."""

    name: str
    state: State
    found: str
    mend: str = ""


def examine(machine: Machine) -> list[Check]:
    """Run every check on the facts of a machine."""
    return [
        _python(machine),
        *_packages(machine),
        _cores(machine),
        _memory(machine),
        _shared_memory(machine),
        _gpus(machine),
        *_clusters(machine),
        _port(machine),
        _ray(machine),
        _ray_ports(machine),
    ]


def _python(machine: Machine) -> Check:
    found = ".".join(map(str, machine.python))
    if machine.python < PYTHON:
        return Check("python", "fail", found, f"use Python {'.'.join(map(str, PYTHON))} or newer")
    return Check("python", "ok", found)


def _packages(machine: Machine) -> Iterator[Check]:
    for wanted, extra in ((BASE, ""), (CLUSTER, "[cluster]"), (DEMO, "[demo]"), (EXAMPLES, "[examples]")):
        for name, least in wanted.items():
            mend = f"pip install --upgrade 'expertmesh{extra}'"
            found = machine.versions.get(name)
            if found is None:
                yield Check(name, "warn" if extra in OPTIONAL else "fail", "not installed", mend)
            elif release(found) < release(least):
                yield Check(name, "fail", f"{found}, needs at least {least}", mend)
            else:
                yield Check(name, "ok", found)


def _cores(machine: Machine) -> Check:
    if machine.cores < 2:
        return Check("cores", "warn", str(machine.cores), "router and experts share one core: expect high latency")
    return Check("cores", "ok", str(machine.cores))


def _memory(machine: Machine) -> Check:
    if machine.memory is None or machine.memory_free is None:
        return Check("memory", "warn", "unknown", "plan about 0.25 GiB for each replica, plus its weights")
    found = f"{machine.memory_free / GIB:.1f} of {machine.memory / GIB:.1f} GiB free"
    if machine.memory_free < GIB:
        return Check("memory", "fail", found, "free at least 1 GiB; a replica takes about 0.25 GiB plus its weights")
    if machine.memory_free < 3 * GIB:
        return Check("memory", "warn", found, "a replica takes about 0.25 GiB plus its weights: run few")
    return Check("memory", "ok", found)


def _shared_memory(machine: Machine) -> Check:
    if machine.shared_memory is None:
        return Check("/dev/shm", "warn", "missing", "Ray will use slower files in /tmp")
    found = f"{machine.shared_memory / GIB:.1f} GiB"
    if machine.shared_memory < GIB:
        return Check("/dev/shm", "warn", found, "Ray passes weights through it: use docker run --shm-size=2g")
    return Check("/dev/shm", "ok", found)


def _gpus(machine: Machine) -> Check:
    if not machine.gpus:
        return Check("gpus", "ok", "none: experts run on the CPU; num_gpus must be 0")
    found = ", ".join(machine.gpus)
    if "+cpu" in (machine.versions.get("torch") or ""):
        return Check("gpus", "warn", found, "torch is a CPU-only build: install a CUDA build")
    return Check("gpus", "ok", found)


def _clusters(machine: Machine) -> Iterator[Check]:
    running = [f"{run.name} at {' and '.join(run.endpoints)} (pid {run.pid})" for run in machine.clusters]
    yield Check("clusters", "ok", ", ".join(running) or "none running")
    for cluster in machine.clusters:
        for endpoint in (endpoint for endpoint in cluster.endpoints if endpoint in machine.silent):
            mend = f"a router that ended is started again within seconds: see `expertmesh status --name {cluster.name}`"
            yield Check("router", "warn", f"{endpoint} of {cluster.name} does not listen", mend)
    for cluster in machine.stale:
        mend = f"run `expertmesh down --name {cluster.name}` to clean up, or start it again"
        yield Check("stale cluster", "warn", f"{cluster.name} (pid {cluster.pid}) died without cleaning up", mend)


def _port(machine: Machine) -> Check:
    if machine.port_free:
        return Check("port", "ok", f"{machine.port} is free")
    owners = [cluster for cluster in machine.clusters if _has_port(cluster, machine.port)]
    if owners:
        return Check("port", "ok", f"{machine.port} is used by cluster {owners[0].name}")
    return Check("port", "warn", f"{machine.port} is in use", "start with `--port 0` (any free port) or another number")


def _has_port(cluster: RunFile, port: int) -> bool:
    return any(endpoint.endswith(f":{port}") for endpoint in cluster.endpoints)


def _ray(machine: Machine) -> Check:
    if not machine.ray:
        return Check("other ray", "ok", "none running")
    folders = [cluster.ray_temp_dir for cluster in machine.clusters if cluster.ray_temp_dir]
    others = [entry for entry in machine.ray if not any(f"logs {folder}/" in entry for folder in folders)]
    if not others:
        return Check("other ray", "ok", "only that of the clusters above")
    mend = 'address="auto" would join it; without `address` a new Ray is started'
    if any("workers at nice 15" in entry for entry in others):
        mend += "; its workers give way to every other process: start it with RAY_worker_niceness=0"
    return Check("other ray", "warn", "; ".join(others), mend)


def _ray_ports(machine: Machine) -> Check:
    if not machine.open_to_others:
        return Check("ray ports", "ok", "none that other machines can reach")
    mend = (
        "whoever reaches them with Ray's token runs any code: close them to all but the nodes of that Ray (firewall, "
        "network policy), or leave `address` out: a Ray of the cluster's own listens on loopback"
    )
    return Check("ray ports", "warn", "; ".join(machine.open_to_others), mend)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in leading[0].split(".")) if leading else ()

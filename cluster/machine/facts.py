"""Facts about this machine, read without starting anything: versions, cores, memory, GPUs, clusters, Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from ...experts.staging.machine_memory import memory_bytes, read_text
from .ports import is_free, is_loopback, listens
from .run_files import RunFile, list_all

SHARED_MEMORY = "/dev/shm"
RAY_SERVERS = ("gcs_server", "raylet")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about this machine. Sizes are in bytes; None means unknown.

    `open_to_others` are the processes of Ray, with their ports, that other machines can reach. `silent` are the
    endpoints of running clusters where nothing listens.
    """

    python: tuple[int, ...]
    versions: Mapping[str, str | None]
    cores: int
    memory: int | None
    memory_free: int | None
    shared_memory: int | None
    gpus: tuple[str, ...]
    clusters: tuple[RunFile, ...]
    stale: tuple[RunFile, ...]
    port: int
    port_free: bool
    ray: tuple[str, ...]
    open_to_others: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


def look(packages: Iterable[str], port: int) -> Machine:
    """Collect the facts of this machine; nothing is imported, started or changed."""
    clusters = list_all()
    stale = tuple(cluster for cluster in clusters if cluster.is_stale())
    running = tuple(cluster for cluster in clusters if cluster not in stale)
    memory, free = memory_bytes()
    return Machine(
        python=tuple(sys.version_info[:3]),
        versions={name: version_of(name) for name in packages},
        cores=cores(),
        memory=memory,
        memory_free=free,
        shared_memory=psutil.disk_usage(SHARED_MEMORY).total if Path(SHARED_MEMORY).is_dir() else None,
        gpus=gpus(),
        clusters=running,
        stale=stale,
        port=port,
        port_free=is_free("127.0.0.1", port),
        ray=ray_processes(),
        open_to_others=open_to_others(),
        silent=tuple(endpoint for run in running for endpoint in run.endpoints if not listens(endpoint)),
    )


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores(root: Path = Path("/")) -> int:
    """The number of cores that this process may use: its CPU affinity, or a lower quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        count = min(count, max(1, int(quota) // int(period)))
    return count


def gpus(root: Path = Path("/")) -> tuple[str, ...]:
    """The models of the NVIDIA GPUs that the driver lists."""
    found = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        models = [line.partition(":")[2].strip() for line in read_text(path).splitlines() if line.startswith("Model:")]
        found.append(models[0] if models else "NVIDIA GPU")
    return tuple(found)


def ray_processes(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Ray clusters that `address="auto"` might join: RAY_ADDRESS, and head processes on this machine."""
    address = environ.get("RAY_ADDRESS")
    found = [f"RAY_ADDRESS={address}"] if address else []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words = process.info["cmdline"] or [""]
        if words[0].endswith("gcs_server"):
            logs = next((word.partition("=")[2] for word in words if word.startswith("--log_dir=")), "unknown")
            nice = (process.info["environ"] or {}).get("RAY_worker_niceness", "15")
            found.append(f"pid {process.pid}, logs {logs}, workers at nice {nice}")
    return tuple(found)


def open_to_others() -> tuple[str, ...]:
    """The processes of Ray on this machine that listen beyond loopback, each with its ports.

    Other users' processes are seen only by root.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
            if process.name() in RAY_SERVERS or process.name().startswith("ray::"):
                sockets = [one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
                ports = sorted({one.port for one in sockets if not is_loopback(one.ip.removeprefix("::ffff:"))})
                if ports:
                    found.append(f"{process.name()} (pid {process.pid}) on {', '.join(map(str, ports))}")
    return tuple(found)

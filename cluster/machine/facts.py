"""What can be seen of this machine without starting anything: versions, cores, memory, GPUs, clusters, Ray."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .run_files import RunFile, list_all


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about this machine. Sizes are in bytes; what cannot be found out is None."""

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


def look(packages: Iterable[str], port: int) -> Machine:
    """Look at this machine; nothing is imported, started or changed."""
    found = list_all()
    stale = tuple(cluster for cluster in found if cluster.is_stale())
    memory, free = memory_bytes()
    return Machine(
        python=tuple(sys.version_info[:3]),
        versions={name: version_of(name) for name in packages},
        cores=cores(),
        memory=memory,
        memory_free=free,
        shared_memory=_size(Path("/dev/shm")),
        gpus=gpus(),
        clusters=tuple(cluster for cluster in found if cluster not in stale),
        stale=stale,
        port=port,
        port_free=port_is_free("127.0.0.1", port),
        ray=ray_processes(),
    )


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: its affinity, or less where a container's quota says so."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        count = min(count, max(1, int(quota) // int(period)))
    return count


def memory_bytes(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Memory in all and free, within what a container may take; None where it cannot be found out."""
    lines = [line.split() for line in _read(root / "proc/meminfo").splitlines()]
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdigit()}
    total, free = sizes.get("MemTotal:"), sizes.get("MemAvailable:")
    limit = _read(root / "sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and (total is None or int(limit) < total):
        used = _read(root / "sys/fs/cgroup/memory.current").strip()
        left = int(limit) - int(used) if used.isdigit() else None
        total, free = int(limit), left if free is None or (left is not None and left < free) else free
    return total, free


def gpus(root: Path = Path("/")) -> tuple[str, ...]:
    """The models of the NVIDIA GPUs that the driver shows."""
    found = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        models = [line.partition(":")[2].strip() for line in _read(path).splitlines() if line.startswith("Model:")]
        found.append(models[0] if models else "NVIDIA GPU")
    return tuple(found)


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return False
    return True


def ray_processes(root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Ray clusters that `address="auto"` might join: RAY_ADDRESS, and head processes on this machine."""
    address = (os.environ if environ is None else environ).get("RAY_ADDRESS")
    found = [f"RAY_ADDRESS={address}"] if address else []
    for path in sorted((root / "proc").glob("[0-9]*/cmdline")):
        words = _read(path).split("\0")
        if words[0].endswith("gcs_server"):
            logs = next((word.partition("=")[2] for word in words if word.startswith("--log_dir=")), "unknown")
            settings = _read(path.parent / "environ").split("\0")
            nice = next((text.partition("=")[2] for text in settings if text.startswith("RAY_worker_niceness=")), "15")
            found.append(f"pid {path.parent.name}, logs {logs}, workers at nice {nice}")
    return tuple(found)


def _size(folder: Path) -> int | None:
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_frsize * status.f_blocks


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

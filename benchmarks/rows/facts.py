"""What a figure depends on: the machine, the versions, the time, and how busy it was before."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from expertmesh.experts.version import version

LIBRARIES = ("torch", "ray", "grpcio", "numpy", "msgpack")


def now() -> datetime:
    """The time."""
    return datetime.now(timezone.utc)


def facts(clock: Callable[[], datetime] = now) -> dict[str, Any]:
    """The machine as it is before anything is started."""
    return {
        "when": clock().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"expertmesh": version()} | {name: _version(name) for name in LIBRARIES},
        "load before": [round(value, 2) for value in os.getloadavg()],
        "threads of torch here": 1,
    }


def cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

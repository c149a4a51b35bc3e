"""What a figure depends on: the machine, the versions, the time, and how busy it was before."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from expertmesh.cluster.machine.facts import version_of
from expertmesh.experts.package_version import version

CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("amx_bf16", "avx512_bf16")
LIBRARIES = ("torch", "ray", "grpcio", "numpy", "msgpack")


def facts(clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> dict[str, Any]:
    """The machine as it is before anything is started."""
    return {
        "when": clock().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "bf16 instructions": bf16_instructions(),
        "cores": os.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"expertmesh": version()} | {name: version_of(name) or "not installed" for name in LIBRARIES},
        "load before": [round(value, 2) for value in os.getloadavg()],
        "threads of torch here": 1,
    }


def cpu_model(file: Path = CPU_INFO) -> str:
    """The processor's name."""
    return _cpu_info(file).get("model name") or platform.processor() or platform.machine()


def bf16_instructions(file: Path = CPU_INFO) -> str:
    """What the processor multiplies bfloat16 with; without any, bf16 is several times slower than fp32."""
    flags = _cpu_info(file).get("flags", "").split()
    return ", ".join(name for name in BF16_FLAGS if name in flags) or "none"


def _cpu_info(file: Path) -> dict[str, str]:
    """What the system says of the first processor."""
    try:
        lines = file.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

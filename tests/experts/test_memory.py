"""Free memory as the machine and its control groups tell it, and what is let go of when there is none."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from expertmesh.experts.errors import ConfigError, TooLarge
from expertmesh.experts.staging.memory import check_memory, free_memory, within_memory

MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    4000 kB\n"


class Big:
    """Something that can be watched."""


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup/{folder}"
    stat = f"anon 1\ninactive_file {cached}\n"
    return {f"{base}/memory.max": f"{limit}\n", f"{base}/memory.current": f"{used}\n", f"{base}/memory.stat": stat}


def old_group(folder: str, limit: int, used: int, cached: int) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory/{folder}"
    stat = f"inactive_file 3\ntotal_inactive_file {cached}\n"
    return {
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{used}\n",
        f"{base}/memory.stat": stat,
    }


V2 = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 4_096_000),
        ({**V2, **group("a/b", "max", 5)}, 4_096_000),
        ({**V2, **group("a/b", "9000", 5000, 700)}, 4700),
        ({**V2, **group("a/b", "9000", 5000), **group("a", "8000", 7000)}, 1000),
        ({**V2, **group("a", "8000", 9000)}, 0),
        ({**V2, **group("", "9000", 5000)}, 4000),
        ({**V2, **group("other", "10", 5)}, 4_096_000),
        ({**V2, "proc/self/cgroup": "0::/../../x\n", **group("x", "9000", 5000)}, 4000),
        ({**V1, **old_group("a", 9000, 5000, 600)}, 4600),
        ({**V1, **old_group("a", 2**63 - 4096, 5000, 600)}, 4_096_000),
    ],
)
def test_the_least_of_machine_and_control_groups_counts(
    files: dict[str, str], left: int | None, tmp_path: Path
) -> None:
    assert free_memory("cpu", machine(tmp_path, files)) == left


def test_this_machine_has_some_and_a_device_without_bytes_has_no_limit() -> None:
    assert (free_memory("cpu") or 0) > 2**20
    assert free_memory("meta") is None


def test_a_reserve_must_be_free_beside_the_old_version() -> None:
    check_memory(100, "cpu", free=lambda _: 120)
    check_memory(100, "cpu", free=lambda _: None)
    with pytest.raises(
        TooLarge,
        match=r"has 100 bytes, and 1\.2 times that must be free on cpu .*, but only 119 bytes are: retire older",
    ):
        check_memory(100, "cpu", free=lambda _: 119)


def test_a_gpu_that_is_full_offers_another_mode() -> None:
    asked: list[str] = []
    with pytest.raises(TooLarge, match=r'free on cuda:1 .*, but only 0 bytes are: stage it with mode="staged_cpu"'):
        check_memory(1, "cuda:1", free=lambda device: asked.append(device) or 0)
    assert asked == ["cuda:1"]


def wrapped(error: Exception) -> Exception:
    outer = ConfigError("the factory could not be called")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        wrapped(MemoryError()),
    ],
    ids=repr,
)
def test_what_runs_out_of_memory_lets_go_of_all_that_it_held(error: Exception) -> None:
    held: list[weakref.ref[Big]] = []

    def work() -> None:
        big = Big()
        held.append(weakref.ref(big))
        raise error

    with pytest.raises(TooLarge, match="cpu ran out of memory while it held both versions: retire older") as caught:
        within_memory(work, "cpu")
    assert held[0]() is None
    assert caught.value.__context__ is None


def test_other_errors_and_results_pass() -> None:
    def work() -> None:
        raise RuntimeError("no memory of it")

    with pytest.raises(RuntimeError, match="no memory of it"):
        within_memory(work, "cpu")
    assert within_memory(lambda: 7, "cpu") == 7

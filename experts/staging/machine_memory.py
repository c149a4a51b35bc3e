"""The total and free memory of this machine and of the control groups of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NAMES_V2 = ("memory.max", "memory.current", "inactive_file")
_NAMES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_bytes(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and free bytes: the minimum over the machine and each control group; None if unknown."""
    lines = [line.split() for line in read_text(root / "proc/meminfo").splitlines()]
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1 and words[1].isdecimal()}
    groups = list(_control_groups(root))
    totals = [sizes.get("MemTotal:"), *(total for total, _ in groups)]
    available = [sizes.get("MemAvailable:"), *(free for _, free in groups)]
    return _least(totals), _least(available)


def read_text(path: Path) -> str:
    """The text of a kernel file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, free) in bytes of the control groups of this process with a limit, versions 2 and 1, innermost first."""
    for line in (read_text(root / "proc/self/cgroup") or "0::/").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _NAMES_V1 if controllers else _NAMES_V2
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath("sys/fs/cgroup", "memory" if controllers else "", *parts[:depth])
            limit, used = (read_text(folder / name).strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():  # else "max", or no such group in this container
                pages = dict(line.split() for line in read_text(folder / "memory.stat").splitlines())
                yield int(limit), max(int(limit) - int(used) + int(pages.get(names[2], 0)), 0)


def _least(sizes: list[int | None]) -> int | None:
    return min((size for size in sizes if size is not None), default=None)

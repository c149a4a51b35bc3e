"""Files by which an experiment and the actors in its cluster talk: when an epoch came, and at which step to die."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from expertmesh.cluster.machine.run_files import home

JOURNALLED = "after begin: the swap is in the journal"
STAGING = "during staging: the first receipt is there"
READY = "before commit: all receipts are there"
STORED = "before commit: the first version is on disk"
COMMITTED = "after commit, before the flip"
FLIPPED = "after the flip, before the answer"
RETIRING = "while retiring: before the first unload"

STEPS = (JOURNALLED, STAGING, READY, STORED, COMMITTED, FLIPPED, RETIRING)
AFTER_COMMIT = (COMMITTED, FLIPPED, RETIRING)
"""Where the swap is durable already, so that it must survive."""


def crash_file(state_dir: str | Path) -> Path:
    """The file that names the step to die at; it is gone when that has happened."""
    return Path(f"{state_dir}.crash")


def flip_file() -> Path:
    """Where the router notes the epochs that it adopts."""
    return home() / "flips"


def commit_file() -> Path:
    """Where the controller notes the epochs that it commits."""
    return home() / "commits"


def note(file: Path, epoch: int) -> None:
    """Write down that an epoch came now, by the clock that all processes of a machine share."""
    with file.open("a") as lines:
        lines.write(f"{epoch} {time.monotonic()!r}\n")


def flip_times(epochs: Collection[int]) -> list[float]:
    """When each of these epochs was adopted first, in monotonic seconds."""
    times = _noted(flip_file())
    return sorted(times[number] for number in epochs)


def flip_delays(epochs: Collection[int]) -> list[float]:
    """Seconds from the commit of each of these epochs to its flip."""
    committed, flipped = _noted(commit_file()), _noted(flip_file())
    return [flipped[number] - committed[number] for number in epochs]


def _noted(file: Path) -> dict[int, float]:
    """{epoch: the first time that was noted for it}."""
    times: dict[int, float] = {}
    for line in file.read_text().splitlines():
        number, _, moment = line.partition(" ")
        times.setdefault(int(number), float(moment))
    return times

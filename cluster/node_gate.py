"""How many experts compute at once on a node: no more than it has cores, whatever the number of processes.

Processes that all wake for one batch would take each other's caches and time slices. A core is a lock on a file in a
folder that the processes share; the kernel gives it back when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class NodeGate:
    """Cores of a node, one of which this process takes to compute. It belongs to one thread."""

    def __init__(self, folder: Path, cores: int) -> None:
        self._files = [
            os.open(folder / f"core-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for number in range(cores)
        ]
        home = os.getpid() % cores
        self._order = self._files[home:] + self._files[:home]
        self._held: int | None = None

    def take(self) -> bool:
        """Take a core; waits for one if all are taken, and says whether it had to."""
        for file in self._order:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            self._held = file
            return False
        fcntl.flock(self._order[0], fcntl.LOCK_EX)
        self._held = self._order[0]
        return True

    def give_back(self) -> None:
        """Give the core back; idempotent."""
        if self._held is not None:
            fcntl.flock(self._held, fcntl.LOCK_UN)
            self._held = None

    def close(self) -> None:
        """Close the files; idempotent."""
        for file in self._files:
            os.close(file)
        self._files = []

"""How many experts compute at once on a node: no more than it has cores, whatever the number of processes.

Processes that all wake for one batch would take each other's caches and time slices. A core is a lock on a file in a
folder that the processes share; the kernel gives it back when its holder dies. Another such lock is the door: who holds
it takes the next core that is free, whichever that is, and the others wait at the door, about in the order of their
coming. So a process that is stopped just there (SIGSTOP) holds up the CPU experts of its node until it goes on or dies.
"""

from __future__ import annotations

import fcntl
import os
import select
import weakref
from contextlib import suppress
from pathlib import Path

RECHECK_MS = 20
"""How soon the core of a holder that died is found: it rings no bell."""


class CoreSlots:
    """Cores of a node, one of which this process takes to compute. It belongs to one thread."""

    def __init__(self, folder: Path, cores: int) -> None:
        create = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._door = os.open(folder / "door", create, 0o600)
        self._cores = [os.open(folder / f"core-{number}", create, 0o600) for number in range(cores)]
        self._held: int | None = None
        bell = folder / "bell"
        with suppress(FileExistsError):
            os.mkfifo(bell, 0o600)
        self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        forgotten = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (forget := forgotten()) and forget())
        self._files = [self._door, *self._cores, self._bell]
        self._rung = select.poll()
        self._rung.register(self._bell, select.POLLIN)

    def take(self) -> bool:
        """Take a core; waits while all are taken or others are at the door, and says whether it had to."""
        waited = not _locked(self._door)
        if waited:
            fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            while not self._take_free():
                waited = True
                if self._rung.poll(RECHECK_MS):
                    os.read(self._bell, 4096)
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)
        return waited

    def give_back(self) -> None:
        """Give the core back; idempotent."""
        if self._held is None:
            return
        fcntl.flock(self._held, fcntl.LOCK_UN)
        self._held = None
        with suppress(BlockingIOError):  # full: it rings anyway
            os.write(self._bell, b"x")

    def close(self) -> None:
        """Give the core back and close the files; idempotent."""
        self.give_back()
        self._forget()

    def _forget(self) -> None:
        """Close the files and unlock nothing: a child that an expert forks must not hold what its parent dies with."""
        self._held = None
        files, self._files = self._files, []
        for file in files:
            os.close(file)

    def _take_free(self) -> bool:
        self._held = next((file for file in self._cores if _locked(file)), None)
        return self._held is not None


def _locked(file: int) -> bool:
    """Whether a file could be locked without waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

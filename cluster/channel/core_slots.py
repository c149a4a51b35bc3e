"""Limits how many experts compute at once on a node to its number of cores, across all processes.

Processes that all wake up for one batch would compete for caches and time slices. A slot is a lock on a file in a
folder that the processes share; the kernel releases it when its holder dies. Waiting processes queue on one more lock,
roughly in order of arrival, and the head of the queue takes the next free slot. Who holds up the others may be stopped
(SIGSTOP) or hang, so nobody waits for long: without a slot, a process computes all the same.
"""

from __future__ import annotations

import fcntl
import os
import select
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

RECHECK_MS = 20
"""How often to check for the slot of a holder that died, in milliseconds: nothing signals that."""


PATIENCE_SECONDS = 1.0
"""How long to wait in the queue, and how long for a core."""


class CoreSlots:
    """The cores of a node, of which this process holds at most one. Not thread-safe."""

    def __init__(self, folder: Path, cores: int) -> None:
        create = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._queue = os.open(folder / "queue", create, 0o600)
        self._cores = [os.open(folder / f"core-{number}", create, 0o600) for number in range(cores)]
        self._held: int | None = None
        self._turn: _Turn | None = None
        self._patience = PATIENCE_SECONDS
        released = folder / "released"
        with suppress(FileExistsError):
            os.mkfifo(released, 0o600)
        self._released = os.open(released, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        forgotten = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (forget := forgotten()) and forget())
        self._files = [self._queue, *self._cores, self._released]
        self._poll = select.poll()
        self._poll.register(self._released, select.POLLIN)

    def take(self) -> bool:
        """Take a core, waiting while all are taken or other processes queue; returns whether it had to wait.

        If the wait is too long there is no core, and until a core is free again the next one is not waited for.
        """
        waited = not _locked(self._queue)
        if waited and not self._queued():
            return True
        try:
            until = time.monotonic() + self._patience
            while not self._take_free():
                waited = True
                if time.monotonic() >= until:
                    self._patience = 0.0
                    return True
                if self._poll.poll(RECHECK_MS):
                    os.read(self._released, 4096)
            self._patience = PATIENCE_SECONDS
        finally:
            fcntl.flock(self._queue, fcntl.LOCK_UN)
        return waited

    def _queued(self) -> bool:
        """Wait for the head of the queue; returns False if it does not move."""
        if self._turn is not None and self._turn.given_up and self._turn.is_alive():
            return False  # an earlier wait still lasts
        self._turn = _Turn(self._queue)
        return self._turn.came(PATIENCE_SECONDS)

    def give_back(self) -> None:
        """Give the core back; idempotent."""
        if self._held is None:
            return
        fcntl.flock(self._held, fcntl.LOCK_UN)
        self._held = None
        with suppress(BlockingIOError):  # the pipe is full: a waiting process wakes up anyway
            os.write(self._released, b"x")

    def close(self) -> None:
        """Give the core back and close the files; idempotent."""
        self.give_back()
        self._forget()

    def _forget(self) -> None:
        """Close the files without unlocking: a child forked by an expert must not keep its parent's locks alive."""
        self._held = None
        files, self._files = self._files, []
        for file in files:
            os.close(file)

    def _take_free(self) -> bool:
        self._held = next((file for file in self._cores if _locked(file)), None)
        return self._held is not None


class _Turn(threading.Thread):
    """Waits for a lock in a thread, since such a wait cannot be bounded; given up, it lets the lock go again."""

    def __init__(self, file: int) -> None:
        super().__init__(name="expertmesh-core-queue", daemon=True)
        self._file = file
        self._came = threading.Event()
        self._deciding = threading.Lock()
        self.given_up = False
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # it was closed meanwhile
            fcntl.flock(self._file, fcntl.LOCK_EX)
            with self._deciding:
                if self.given_up:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
                else:
                    self._came.set()

    def came(self, seconds: float) -> bool:
        """Wait until the lock is held; returns whether it is."""
        if not self._came.wait(seconds):
            with self._deciding:
                self.given_up = not self._came.is_set()
        return not self.given_up


def _locked(file: int) -> bool:
    """Try to lock a file without waiting; returns whether that succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

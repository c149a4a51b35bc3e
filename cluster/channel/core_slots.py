"""Limits how many experts compute at once on a node to its number of cores, across all processes.

Processes that all wake up for one batch would compete for caches and time slices. A slot is a lock on a file in a
folder that the processes share; the kernel releases it when its holder dies. Waiting processes queue on one more lock,
roughly in order of arrival, and the head of the queue takes the next free slot. Who holds up the others may be stopped
(SIGSTOP) or hang, so nobody waits long for a queue that stands still: without a slot, a process computes all the same.
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
from queue import SimpleQueue

RECHECK_MS = 20
"""How often to check for the slot of a holder that died, in milliseconds: nothing signals that."""


PATIENCE_SECONDS = 1.0
"""How long to wait in a queue that stands still, and at its head for a core."""


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
            with suppress(OSError):  # the disk is full, or turned read-only
                os.pwrite(
                    self._queue, time.monotonic_ns().to_bytes(8, "big"), 0
                )  # whoever waits sees that the queue moves
        finally:
            fcntl.flock(self._queue, fcntl.LOCK_UN)
        return waited

    def _queued(self) -> bool:
        """Wait for the head of the queue; returns False if the queue does not move."""
        if self._turn is None:
            self._turn = _Turn(self._queue)
        if self._turn.given_up:
            return False  # an earlier wait still lasts
        self._turn.ask()
        before = b""
        while not self._turn.came(PATIENCE_SECONDS):
            now = os.pread(self._queue, 8, 0)
            if now == before:
                return not self._turn.give_up()
            before = now
        return True

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
        if self._turn is not None:
            self._turn.end()
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
    """Waits for a lock in a thread, since such a wait cannot be bounded; given up, it lets the lock go again.

    The thread lasts, and waits each time that it is asked to.
    """

    def __init__(self, file: int) -> None:
        super().__init__(name="expertmesh-core-queue", daemon=True)
        self._file = file
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._came = threading.Event()
        self._deciding = threading.Lock()
        self.given_up = False
        self.start()

    def run(self) -> None:
        while self._asked.get():
            with suppress(OSError):  # it was closed meanwhile
                fcntl.flock(self._file, fcntl.LOCK_EX)
                with self._deciding:
                    if self.given_up:
                        fcntl.flock(self._file, fcntl.LOCK_UN)
                        self.given_up = False
                    else:
                        self._came.set()

    def ask(self) -> None:
        """Begin to wait for the lock."""
        self._came.clear()
        self._asked.put(True)

    def came(self, seconds: float) -> bool:
        """Wait for as long until the lock is held; returns whether it is."""
        return self._came.wait(seconds)

    def give_up(self) -> bool:
        """Wait no more; returns False if the lock is held after all."""
        with self._deciding:
            self.given_up = not self._came.is_set()
        return self.given_up

    def end(self) -> None:
        """End the thread when it waits no more."""
        self._asked.put(False)


def _locked(file: int) -> bool:
    """Try to lock a file without waiting; returns whether that succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""What survives every crash: the real registry on a database in memory, and version folders that are only names."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.loop import Killed
from sim.network import Process

from expertmesh.cluster.state import registry as product
from expertmesh.cluster.state.records import EpochRecord
from expertmesh.experts.errors import FailedPrecondition, NotFound, Unavailable

if TYPE_CHECKING:
    from sim.world import World

FULL = 0.03
COMMIT_SILENT, COMMIT_LATE = 0.03, 0.04
SILENT, LATE = 0.004, 0.004


class Disk:
    """The database and the names of the folders; and, for the checker alone, every epoch that ever was (`history`), the
    epoch of every swap, and how the versions end that were last committed as declared."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.folders: set[tuple[str, str]] = set()
        self.history: dict[int, Mapping[str, str]] = {}
        self.swaps: dict[str, int] = {}
        self.declared: dict[str, str] = {}
        self.oldest = 0
        self.term = 0

    @property
    def current(self) -> int:
        """The number of the newest epoch; 0 before the first."""
        return max(self.history, default=0)

    @property
    def epochs(self) -> dict[int, Mapping[str, str]]:
        """The epochs that the registry still keeps."""
        return {number: versions for number, versions in self.history.items() if number >= self.oldest}


class Registry(product.Registry):
    """The real registry of one controller; its disk fails now and then, before it has done what it was asked, or after.

    A process that was killed reads and writes nothing any more.
    """

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process
        self._opened = self._committing = False
        self._clock = lambda: world.clock.now
        self._lock = threading.RLock()
        disk = self._connection = world.disk.connection
        self.cluster_id, self.term = product._take_over(disk, new=not world.disk.term)
        world.disk.term = self.term

    def opened(self) -> None:
        """From now on the disk may fail."""
        self._opened = True

    def close(self) -> None:
        """The database is the world's."""

    def _record(self) -> None:
        """A database in memory has no file beside it."""

    def commit(self, *asked: Any, **more: Any) -> EpochRecord:
        self._committing = True
        try:
            return super().commit(*asked, **more)
        finally:
            self._committing = False

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        if not self._process.alive:
            raise Killed
        with super()._read() as db:
            yield db

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        silent, late = (COMMIT_SILENT, COMMIT_LATE) if self._committing else (SILENT, LATE)
        chance = self._world.clock.rng.random() if self._opened and self._world.disk_fails else 1.0
        if chance < silent:
            raise Unavailable("the disk does not answer")
        with self._transaction() as db:
            yield db
        self._look()
        if chance < silent + late:
            if self._committing and self._world.stormy:  # a controller that waits for a disk is soon given up
                self._world.clock.after(0.1, self._world.replace_controller)
            raise Unavailable("the disk has done it, but did not say so in time")

    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        return super()._change()

    def _look(self) -> None:
        """See which epochs there are now."""
        disk = self._world.disk
        oldest, newest = disk.connection.execute("SELECT MIN(number), MAX(number) FROM epochs").fetchone()
        disk.oldest = oldest or 0
        if newest is not None and newest > disk.current:
            epoch = self.epoch(newest)
            disk.history[newest], disk.swaps[epoch.swap_id] = epoch.versions, newest
            self._world.checker.committed(self.term, newest, epoch.swap_id)


class Store:
    """Version folders. A version that was written is there for every controller, and a write may find the disk full."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    @property
    def _folders(self) -> set[tuple[str, str]]:
        if not self._process.alive:
            raise Killed
        return self._world.disk.folders

    def write(
        self, id: str, version: str, source: Path | None, manifest: Mapping[str, Any], *, move: bool = False
    ) -> None:
        """Keep a version."""
        folders = self._folders
        if self._world.disk_fails and self._world.clock.chance(FULL):
            raise FailedPrecondition(f"cannot store {version} of {id}: the disk is full")
        folders.add((id, version))

    def weights(self, id: str, version: str) -> Path | None:
        """No version has a file of weights, but it has to be there."""
        if (id, version) not in self._folders:
            raise NotFound(f"{version} of {id} is not stored")
        return None

    def verify(self, id: str, version: str) -> None:
        """No version rots here."""

    def remove(self, id: str, version: str) -> None:
        """Forget a version."""
        self._folders.discard((id, version))

    def sweep(self, known: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
        """Forget all versions but these."""
        gone = {folder for folder in self._folders if folder not in known}
        self._folders.difference_update(gone)
        return sorted(gone)

    def upload_path(self, upload_id: str) -> Path:
        """Where an upload would be."""
        return Path("uploads", upload_id)

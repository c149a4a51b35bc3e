"""What a test session leaves on the machine: its processes, shared memory and files, whatever else runs beside it.

A session is known by its temporary folder, which all processes that it starts have in their environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from helpers.waiting import eventually

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Session:
    """A test session: `folder` is its TMPDIR, `home` its EXPERTMESH_HOME."""

    folder: Path
    home: Path

    def traces(self) -> Traces:
        """What there is of this session now."""
        return Traces(self, frozenset(self.processes()), frozenset(_named_memory()), frozenset(self.files()))

    def processes(self) -> set[str]:
        """Live processes that this one has started, and those that carry the session's mark although nobody waits."""
        found = {process.pid: process for process in psutil.Process().children(recursive=True)}
        found |= {process.pid: process for process in psutil.process_iter() if self._marks(process)}
        names = set()
        for process in found.values():
            with suppress(psutil.NoSuchProcess):
                zombie = process.status() == psutil.STATUS_ZOMBIE
                if not zombie and "resource_tracker" not in " ".join(process.cmdline()):
                    names.add(f"{process.pid} {process.name()}")
        return names

    def files(self) -> set[str]:
        """Run files of clusters, and the folders of clusters and their private Rays among the temporary files."""
        run_files = (path for path in (self.home / "run").glob("*") if path.suffix != ".lock")
        return {str(path) for path in (*run_files, *self.folder.glob("expertmesh-*"))}

    def held_elsewhere(self, name: str) -> bool:
        """Whether a process that is not of this session holds some named shared memory open or mapped."""
        own = {int(process.partition(" ")[0]) for process in self.processes()} | {os.getpid()}
        others = (process for process in psutil.process_iter() if process.pid not in own)
        return any(str(SHARED_MEMORY / name) in _held(process.pid) for process in others)

    def _marks(self, process: psutil.Process) -> bool:
        """Whether a process has the session's folder as TMPDIR, or, with a title in its place, open files there."""
        if process.pid == os.getpid():
            return False
        with suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(self.folder):
                return True
        return any(held.startswith(f"{self.folder}/") for held in _open_files(process.pid))


@dataclass(frozen=True)
class Traces:
    """What there was of a session at one moment."""

    session: Session
    processes: frozenset[str]
    shared_memory: frozenset[str]
    files: frozenset[str]

    def check_nothing_came(self, process_seconds: float = 15.0, memory_seconds: float = 5.0) -> None:
        """Fail for what has come since and stays. Processes may take a while to end, and memory to be released."""
        eventually(lambda: not self.new_processes(), process_seconds, f"these processes end: {self.new_processes()}")
        eventually(lambda: not self.new_memory(), memory_seconds, f"this shared memory goes: {self.new_memory()}")
        files = self.session.files() - self.files
        assert not files, f"left behind: {files}"

    def new_processes(self) -> set[str]:
        """The processes of the session that were not there then."""
        return self.session.processes() - self.processes

    def new_memory(self) -> set[str]:
        """The named shared memory that was not there then.

        What another session's process made and lost in this time cannot be told from ours.
        """
        return {name for name in _named_memory() - self.shared_memory if not self.session.held_elsewhere(name)}


def _named_memory() -> set[str]:
    """The named shared memory of this user."""
    names = set()
    for path in SHARED_MEMORY.iterdir():
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.geteuid():
                names.add(path.name)
    return names


def _held(pid: int) -> set[str]:
    """The files that a process holds open or mapped."""
    with suppress(OSError):  # it is gone, or another user's
        mapped = {
            line.split(maxsplit=5)[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line
        }
        return mapped | set(_open_files(pid))
    return set()


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it was closed meanwhile
                yield os.readlink(descriptor)

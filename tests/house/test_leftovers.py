"""The proof that nothing is left sees what this session leaves, and nothing of whoever else uses the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.leftovers import SHARED_MEMORY, Session
from helpers.waiting import eventually

HOLD = "import sys, threading; kept = [open(path) for path in sys.argv[1:]]; threading.Event().wait()"


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a process that holds files open and that nobody waits for, as if in a session with that TMPDIR."""
    started: list[int] = []

    def start(folder: Path, *paths: Path) -> int:
        command = ["sh", "-c", '"$@" >&- 2>&- & echo $!', "sh", sys.executable, "-c", HOLD, *map(str, paths)]
        environment = os.environ | {"TMPDIR": str(folder)}
        done = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, check=True)
        started.append(int(done.stdout))
        return started[-1]

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def memory() -> Iterator[Path]:
    path = SHARED_MEMORY / f"expertmesh-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def test_a_process_that_nobody_waits_for_is_left(session: Session, orphan: Callable[..., int]) -> None:
    before = session.traces()
    pid = orphan(session.folder)
    eventually(lambda: any(name.startswith(f"{pid} ") for name in before.new_processes()), 10, "it is seen")
    with pytest.raises(AssertionError, match=f"these processes end: .*{pid} "):
        before.check_nothing_came(process_seconds=0)
    os.kill(pid, signal.SIGKILL)
    before.check_nothing_came()


def test_a_process_of_another_session_is_not(session: Session, orphan: Callable[..., int], tmp_path: Path) -> None:
    before = session.traces()
    orphan(tmp_path)
    before.check_nothing_came(process_seconds=1)


def test_a_process_without_a_mark_is_known_by_its_open_files(
    session: Session, orphan: Callable[..., int], tmp_path: Path
) -> None:
    log = session.folder / "log"
    log.touch()
    before = session.traces()
    orphan(tmp_path, log)
    eventually(before.new_processes, 10, "it is seen")


def test_shared_memory_that_nobody_holds_is_left(session: Session, memory: Path) -> None:
    before = session.traces()
    memory.touch()
    with pytest.raises(AssertionError, match=f"this shared memory goes: .*{memory.name}"):
        before.check_nothing_came(memory_seconds=0)
    memory.unlink()
    before.check_nothing_came()


def test_shared_memory_of_another_session_is_not(
    session: Session, memory: Path, orphan: Callable[..., int], tmp_path: Path
) -> None:
    before = session.traces()
    memory.touch()
    orphan(tmp_path, memory)
    before.check_nothing_came(memory_seconds=10)


@pytest.mark.parametrize("place", ["folder", "home"])
def test_files_are_left(session: Session, place: str) -> None:
    before = session.traces()
    path = {"folder": session.folder / "expertmesh-x", "home": session.home / "run" / "x.json"}[place]
    path.parent.mkdir(exist_ok=True)
    path.touch()
    try:
        with pytest.raises(AssertionError, match=r"left behind: .*x"):
            before.check_nothing_came()
    finally:
        path.unlink()


def test_files_of_another_session_are_not(session: Session, tmp_path: Path) -> None:
    before = session.traces()
    (tmp_path / "expertmesh-x").touch()
    foreign = session.folder.parent / f"expertmesh-{uuid.uuid4().hex}"
    foreign.touch()
    try:
        before.check_nothing_came()
    finally:
        foreign.unlink()

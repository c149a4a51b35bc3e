"""Which processes belong to the Ray of a folder, and that they end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertmesh.cluster.runtime.ray_reaper import (
    KEEPS_ENVIRONMENT,
    MARKER,
    end_marked_processes,
    marked,
    marked_processes,
    start_reaper,
)

SLEEPS = "import time; time.sleep(60)"
OPENS = "import sys; file = open(sys.argv[1]); print(flush=True); " + SLEEPS


@contextmanager
def child(code: str, *words: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", code, *words]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_mark_is_given_only_to_what_is_started_in_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEPS_ENVIRONMENT, "mine")
    before = dict(os.environ)
    tell = [
        sys.executable,
        "-c",
        f"import os; print(os.environ.get({MARKER!r}), os.environ.get({KEEPS_ENVIRONMENT!r}))",
    ]
    with marked("/tmp/x"):
        assert subprocess.run(tell, capture_output=True, text=True, check=True).stdout == "/tmp/x 1\n"
    assert dict(os.environ) == before
    assert subprocess.run(tell, capture_output=True, text=True, check=True).stdout == "None mine\n"


def test_processes_of_a_folder_are_found_and_end(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / "log").touch()
    mark = {MARKER: str(folder)}
    with (
        child(SLEEPS, **mark) as carries,
        child(OPENS, str(folder / "log")) as opens,
        child(SLEEPS, **{MARKER: f"{folder}2"}) as other,
        child("", **mark) as dead,
    ):
        assert opens.stdout
        opens.stdout.readline()
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        assert marked_processes(str(folder)) == [carries.pid]
        end_marked_processes(str(folder))
        assert carries.wait(5) < 0
        assert opens.poll() is other.poll() is None  # a file of the folder that is open, as by `tail`, is no mark


def test_a_reaper_outlives_its_owner_and_clears_what_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "expertmesh-x" / "ray"
    folder.mkdir(parents=True)
    with child(SLEEPS, **{MARKER: str(folder)}) as left:
        reaper = start_reaper(str(folder))
        assert set(marked_processes(str(folder))) == {left.pid}
        reaper.communicate()  # the owner's end of the pipe closes, as at its death
        assert left.wait(5) < 0
    deadline = time.monotonic() + 5
    while folder.parent.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not folder.parent.exists()

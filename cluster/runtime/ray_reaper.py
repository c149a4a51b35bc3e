"""A small process that cleans up after a private Ray when its owner dies; a pipe from the owner signals that.

Run as `python -m expertmesh.cluster.runtime.ray_reaper FOLDER`, with the pipe as standard input. All processes of that
Ray, and no others, have the folder in their environment. This module does not import Ray, and imports nothing after its
start, because it must outlive both.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from ..machine.temp_folder import PREFIX, run_folder_of

MODULE = "expertmesh.cluster.runtime.ray_reaper"
MARKER = "EXPERTMESH_RAY_DIR"
"""The environment variable with the folder of a private Ray, set in all its processes."""

KEEPS_ENVIRONMENT = "SPT_NOENV"
"""Set where a process that changes its title, as Ray's workers do, shall not overwrite its environment with it."""

KILL_SECONDS = 5.0


@contextmanager
def marked(folder: str) -> Iterator[None]:
    """Mark the processes that are started in this block, and all that those start, as belonging to `folder`."""
    before = {name: os.environ.get(name) for name in (MARKER, KEEPS_ENVIRONMENT)}
    os.environ.update({MARKER: folder, KEEPS_ENVIRONMENT: "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_reaper(folder: str) -> subprocess.Popen[bytes]:
    """Start a reaper that waits for this process to end, in its own session so that Ctrl-C does not reach it.

    It holds no output of this process open, whose readers wait for its end.
    """
    command = [sys.executable, "-m", MODULE, folder]
    silent = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True, cwd="/"
    )


def end_marked_processes(folder: str) -> None:
    """Kill every process that is marked with `folder`, except this one."""
    deadline = time.monotonic() + KILL_SECONDS
    while (pids := marked_processes(folder)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked_processes(folder: str) -> list[int]:
    """The pids of the live processes that are marked with `folder`, without this one."""
    pids = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(MARKER) == folder and process.status() != psutil.STATUS_ZOMBIE:
                pids.append(process.pid)
        except (psutil.Error, OSError):  # it has ended, or belongs to another user
            continue
    return pids


def main(folder: str) -> None:
    """Wait for the owner's end, then kill all processes of a Ray's folder, and remove that of its run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_marked_processes(folder)
    if (run := run_folder_of(folder)).name.startswith(PREFIX):
        shutil.rmtree(run, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])

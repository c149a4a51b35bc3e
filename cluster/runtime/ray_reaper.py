"""A small process that cleans up after a private Ray when its owner dies; a pipe from the owner signals that.

Run as `python -m expertmesh.cluster.runtime.ray_reaper FOLDER`, with the pipe as standard input. All processes of that
Ray have the folder in their environment. This module does not import Ray, and imports nothing after its start, because
it must outlive both.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

MODULE = "expertmesh.cluster.runtime.ray_reaper"
MARKER = "EXPERTMESH_RAY_DIR"
"""The environment variable with the folder of a private Ray, set in all its processes."""

KILL_SECONDS = 5.0


def start_reaper(folder: str) -> subprocess.Popen[bytes]:
    """Start a reaper that waits for this process to end, in its own session so that Ctrl-C does not reach it."""
    command = [sys.executable, "-m", MODULE, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")


def end_marked_processes(folder: str, spare: int = 0) -> None:
    """Kill every process of the Ray of `folder`, except this one and `spare`."""
    deadline = time.monotonic() + KILL_SECONDS
    while (pids := marked_processes(folder, spare)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked_processes(folder: str, spare: int = 0) -> list[int]:
    """The pids of live processes with `folder` in their environment or a file of it open.

    Excludes this process, reapers and `spare`.
    """
    pids = []
    for process in psutil.process_iter():
        if process.pid in (os.getpid(), spare):
            continue
        try:  # a process that changed its title has lost its environment
            carries = process.environ().get(MARKER) == folder or _has_open(process, folder)
            if carries and process.status() != psutil.STATUS_ZOMBIE and MODULE not in process.cmdline():
                pids.append(process.pid)
        except (psutil.Error, OSError):  # it has ended, or belongs to another user
            continue
    return pids


def _has_open(process: psutil.Process, folder: str) -> bool:
    return any(file.path.startswith(f"{folder}/") for file in process.open_files())


def main(folder: str) -> None:
    """Wait for the owner's end, then kill all processes and remove the folder if it is named expertmesh-*."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = os.getppid()
    sys.stdin.buffer.read()
    # After an orderly stop the owner is still alive, and may still have Ray's log files open.
    end_marked_processes(folder, spare=owner if os.getppid() == owner else 0)
    if Path(folder).name.startswith("expertmesh-"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""Ends what a private Ray leaves when its owner dies: a small process that waits for the owner's end of a pipe.

Run as `python -m expertmesh.cluster.runtime.ray_reaper FOLDER`, with the pipe as standard input. All processes
of that Ray carry the folder in their environment. No Ray is imported here, and nothing later than at the start: it
must outlive both.
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
"""Names the folder of a private Ray in the environment of all its processes."""

KILL_SECONDS = 5.0


def start_reaper(folder: str) -> subprocess.Popen[bytes]:
    """Start a reaper that waits for this process to end; it is in a session of its own, so that Ctrl-C spares it."""
    command = [sys.executable, "-m", MODULE, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")


def end_marked_processes(folder: str, spare: int = 0) -> None:
    """Kill every process that belongs to the Ray of `folder`, but this one and `spare`."""
    deadline = time.monotonic() + KILL_SECONDS
    while (left := marked_processes(folder, spare)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked_processes(folder: str, spare: int = 0) -> list[int]:
    """The live processes that carry `folder` in their environment or have a file of it open.

    This process, reapers, and `spare` are left out.
    """
    found = []
    for process in psutil.process_iter():
        if process.pid in (os.getpid(), spare):
            continue
        try:  # one that changed its title has lost its environment
            carries = process.environ().get(MARKER) == folder or _has_open(process, folder)
            if carries and process.status() != psutil.STATUS_ZOMBIE and MODULE not in process.cmdline():
                found.append(process.pid)
        except (psutil.Error, OSError):  # it is gone, or another user's
            continue
    return found


def _has_open(process: psutil.Process, folder: str) -> bool:
    return any(file.path.startswith(f"{folder}/") for file in process.open_files())


def main(folder: str) -> None:
    """Wait for the owner's death, then kill and clear. A folder that is not one of ours is left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = os.getppid()
    sys.stdin.buffer.read()
    # An owner that stopped in good order lives on, and may still have Ray's log files open.
    end_marked_processes(folder, spare=owner if os.getppid() == owner else 0)
    if Path(folder).name.startswith("expertmesh-"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])

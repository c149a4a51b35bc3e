"""Ends what a private Ray leaves when its owner dies: a small process that waits for the owner's end of a pipe.

Run as `python -m expertmesh.cluster.reaper FOLDER`, with the pipe as standard input. All processes of that Ray carry
the folder in their environment. Standard library only, and no Ray: it must outlive both.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MODULE = "expertmesh.cluster.reaper"
MARKER = "EXPERTMESH_RAY_DIR"
"""Names the folder of a private Ray in the environment of all its processes."""

KILL_SECONDS = 5.0


def start_reaper(folder: str) -> subprocess.Popen[bytes]:
    """Start a reaper that waits for this process to end; it is in a session of its own, so that Ctrl-C spares it."""
    command = [sys.executable, "-m", MODULE, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")


def end_marked_processes(folder: str) -> None:
    """Kill every process that carries `folder` in its environment, but this one."""
    deadline = time.monotonic() + KILL_SECONDS
    while (left := marked_processes(folder)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked_processes(folder: str) -> list[int]:
    """The live processes that carry `folder` in their environment, but this one and reapers."""
    wanted = f"{MARKER}={folder}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            carries = wanted in (process / "environ").read_bytes().split(b"\0")
            alive = (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            reaper = MODULE.encode() in (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it is gone, or another user's
            continue
        if carries and alive and not reaper:
            found.append(int(process.name))
    return found


def main(folder: str) -> None:
    """Wait for the owner's death, then kill and clear. A folder that is not one of ours is left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_marked_processes(folder)
    if Path(folder).name.startswith("expertmesh-"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])

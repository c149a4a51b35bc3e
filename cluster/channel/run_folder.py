"""The folder of a cluster's sockets and locks on one node: this user's alone, and never left behind for long.

Whoever uses it holds a shared lock in it; a folder that nobody holds belongs to a cluster that is gone, and the next
one that starts on the node removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from ...experts.errors import FailedPrecondition

PREFIX = "expertmesh-run-"
_ALIVE = "alive"


def folder_of(run: str) -> Path:
    """Where the folder of a run of a cluster is on this node."""
    return Path(tempfile.gettempdir()) / f"{PREFIX}{run}"


def hold(folder: Path) -> int:
    """Make the folder where it is missing, and hold it; returns the descriptor that holds it, to be kept open.

    Raises FailedPrecondition for a folder that somebody else could write to.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise FailedPrecondition(f"{folder} is not a folder of this user alone: remove it")
    holder = os.open(folder / _ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(holder, fcntl.LOCK_SH)
    if os.fstat(holder).st_nlink == 0:  # swept between making and holding
        os.close(holder)
        return hold(folder)
    return holder


def sweep() -> list[Path]:
    """Remove the folders of this user's clusters that are gone from this node; returns them."""
    gone = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
    return gone


def _abandoned(folder: Path) -> bool:
    try:
        if folder.lstat().st_uid != os.geteuid():
            return False
        holder = os.open(folder / _ALIVE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # not ours, half made, or just removed
        return False
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(holder)
    return True

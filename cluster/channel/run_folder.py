"""The folder of a cluster's sockets and locks on one node: private to this user, and removed once unused.

Every process that uses it holds a shared lock in it. A folder without a holder belongs to a cluster that has ended; the
next cluster that starts on the node removes it.
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
    """The folder of a cluster's run on this node."""
    return Path(tempfile.gettempdir()) / f"{PREFIX}{run}"


def hold(folder: Path) -> int:
    """Create the folder if it is missing, and lock it; returns the descriptor of the lock, which must stay open.

    Raises FailedPrecondition for a folder that other users can access.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise FailedPrecondition(f"{folder} must be a folder that belongs to this user with mode 700: remove it")
    holder = os.open(folder / _ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(holder, fcntl.LOCK_SH)
    if os.fstat(holder).st_nlink == 0:  # swept before it was locked
        os.close(holder)
        return hold(folder)
    return holder


def sweep() -> list[Path]:
    """Remove the folders of this user's clusters that have ended; returns them."""
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _abandoned(folder: Path) -> bool:
    try:
        if folder.lstat().st_uid != os.geteuid():
            return False
        holder = os.open(folder / _ALIVE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # foreign, incomplete, or just removed
        return False
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(holder)
    return True

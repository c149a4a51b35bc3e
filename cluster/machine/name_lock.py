"""One cluster for each name: the lock on a name, and the clearing of what a dead cluster of that name left."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from ...experts.errors import DataLoss, FailedPrecondition, NotFound
from .run_files import RunFile, home, lock_path, run_path, token_path


def lock_name(name: str) -> IO[bytes]:
    """Take a cluster name for this process, and clear what a dead cluster of that name left.

    The name is given back when the file that is returned is closed, or the process ends. Raises FailedPrecondition
    while another cluster runs under the name.
    """
    home()
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    held = os.fdopen(os.open(lock_path(name), flags, 0o600), "r+b")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = _left(name)
        if left is not None and left.pid != os.getpid() and not left.is_stale():
            raise BlockingIOError  # the lock file was removed under a cluster that still runs
        clear(name, left)
    except BaseException as error:
        held.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise FailedPrecondition(
            f"cluster {name!r} is already running{_where(name)}: choose another --name, or run "
            f"`expertmesh down --name {name}`"
        ) from None
    return held


def clear(name: str, left: RunFile | None) -> None:
    """Remove what a dead cluster left: run file, token file, and the temporary folder of its Ray."""
    if left is not None and left.ray_temp_dir is not None and may_be_removed(Path(left.ray_temp_dir)):
        shutil.rmtree(left.ray_temp_dir, ignore_errors=True)
    run_path(name).unlink(missing_ok=True)
    token_path(name).unlink(missing_ok=True)


def _left(name: str) -> RunFile | None:
    try:
        return RunFile.read(name)
    except (NotFound, DataLoss):
        return None


def _where(name: str) -> str:
    left = _left(name)
    return "" if left is None else f" (pid {left.pid}, endpoint {left.endpoint})"


def may_be_removed(folder: Path) -> bool:
    """Whether a folder is one that a cluster made: absolute, ours, no link, and no parent of the home folders."""
    if not folder.is_absolute() or folder.is_symlink() or not folder.is_dir() or len(folder.parts) < 3:
        return False
    if folder.stat().st_uid != os.geteuid():
        return False
    kept = (home(), Path(os.path.expanduser("~")), Path.cwd())
    return not any(folder == path or folder in path.parents for path in kept)

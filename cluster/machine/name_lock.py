"""One cluster for each name: the lock on a name, and the clearing of what a dead cluster of that name left."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from ...experts.errors import DataLoss, FailedPrecondition, NotFound
from .run_files import RunFile, home, lock_path, run_path, token_path


class NameLock:
    """The hold of this process on a cluster name, until `release` or the end of the process."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the name back; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> NameLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock_name(name: str) -> NameLock:
    """Take a cluster name for this process, and clear what a dead cluster of that name left.

    Raises FailedPrecondition while another cluster runs under the name.
    """
    home()
    descriptor = os.open(lock_path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = _left(name)
        if left is not None and left.pid != os.getpid() and not left.is_stale():
            raise BlockingIOError  # the lock file was removed under a cluster that still runs
        clear(name, left)
    except BlockingIOError:
        os.close(descriptor)
        raise FailedPrecondition(
            f"cluster {name!r} already runs{_where(name)}: choose another --name or run `expertmesh down --name {name}`"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return NameLock(name, descriptor)


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

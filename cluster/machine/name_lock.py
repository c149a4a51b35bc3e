"""One cluster per name: the lock on a name, and the clean-up after a dead cluster with that name."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from ...experts.errors import DataLoss, FailedPrecondition, NotFound
from .run_files import RunFile, home, lock_path, run_path, socket_paths, token_path
from .temp_folder import run_folder_of


class NameLock:
    """The lock on a cluster name. Closing it, or the end of the process, releases it; closing removes its file, too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o600), "r+b")

    def acquire(self) -> bool:
        """Take the lock; False if its file was removed meanwhile. Raises BlockingIOError if another process has it."""
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(self._file.fileno()).st_nlink > 0

    def close(self) -> None:
        """Remove the file and release the lock; idempotent."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()

    def give_up(self) -> None:
        """Close the file of a lock that was not acquired."""
        self._file.close()

    def __enter__(self) -> NameLock:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def lock_name(name: str) -> NameLock:
    """Lock a cluster name for this process, and clean up after a dead cluster with that name.

    Raises FailedPrecondition while another cluster with that name is running.
    """
    home()
    lock = NameLock(lock_path(name))
    try:
        while not lock.acquire():
            lock.give_up()
            lock = NameLock(lock_path(name))
        run_file = _run_file(name)
        if run_file is not None and run_file.pid != os.getpid() and not run_file.is_stale():
            raise BlockingIOError  # the lock file was removed while that cluster is running
        clear(name, run_file)
    except BaseException as error:
        lock.give_up()
        if not isinstance(error, BlockingIOError):
            raise
        raise FailedPrecondition(
            f"cluster {name!r} is already running{_where(name)}: stop it, or choose another name"
        ) from None
    return lock


def clear(name: str, run_file: RunFile | None) -> None:
    """Remove the run file, the token file, the sockets and the temporary Ray folder of a dead cluster."""
    if run_file is not None and run_file.ray_temp_dir is not None:
        folder = run_folder_of(run_file.ray_temp_dir)
        if may_be_removed(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for path in (run_path(name), token_path(name), *socket_paths(name)):
        path.unlink(missing_ok=True)


def _run_file(name: str) -> RunFile | None:
    try:
        return RunFile.read(name)
    except (NotFound, DataLoss):
        return None


def _where(name: str) -> str:
    run_file = _run_file(name)
    return "" if run_file is None else f" (pid {run_file.pid}, endpoint {run_file.endpoint})"


def may_be_removed(folder: Path) -> bool:
    """Whether a folder is safe to remove: absolute, owned by this user, not a link, and no parent of a home folder."""
    if not folder.is_absolute() or folder.is_symlink() or not folder.is_dir() or len(folder.parts) < 3:
        return False
    if folder.stat().st_uid != os.geteuid():
        return False
    kept = (home(), Path(os.path.expanduser("~")), Path.cwd())
    return not any(folder == path or folder in path.parents for path in kept)
